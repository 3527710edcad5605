// The page "Explore": ratios of precomputed prices, their class, and the address that holds the state.
//
// Data: window.engramGrid (docs/assets/grid.js), prices at [padding][share][hot][compute]; thresholds from the verdict.
(function () {
  "use strict";
  const AXES = ["padding", "share", "hot", "compute"];
  const count = (value) => value.toLocaleString("en-US");
  const percent = (value) => `${+(100 * value).toPrecision(3)} %`;
  const SAYS = {
    padding: { title: "Padding M", text: (v) => `${count(v)} values`, short: count },
    share: { title: "Share offloaded p", text: percent, short: percent },
    hot: { title: "Hot tier", text: (v) => (v ? `${percent(v)} of the rows` : "none"), short: percent },
    compute: {
      title: "Compute per value",
      text: (v) => (v ? `the layer, width ${v}` : "none: row reads alone"),
      short: (v) => (v ? count(v) : "reads"),
    },
  };
  const START = { padding: 1e6, share: 1, hot: 0, compute: 0 };
  const times = (ratio) => `${ratio < 100 ? ratio.toPrecision(3) : count(Math.round(ratio))}×`;

  function make(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // The same rule as bench/instruments/claim.py, with its thresholds.
  function classify(ratio, { strong_below, win_up_to, loss_above }) {
    if (ratio < strong_below) return ["WIN", `below ${strong_below}×: the claim holds, more than the thresholds ask`];
    if (ratio <= win_up_to) return ["WIN", `up to ${win_up_to}×: the claim holds`];
    if (ratio <= loss_above) return ["INCONCLUSIVE", `between ${win_up_to}× and ${loss_above}×`];
    return ["LOSS", `above ${loss_above}× in price; wall time is not part of this page`];
  }

  function explorer(root, grid) {
    const places = {}; // per axis, the place of its value
    let moved = "padding";

    const price = (variant, at) => AXES.reduce((level, axis) => level[at[axis]], grid.prices[variant]);
    const ratio = (variant, at) => price(variant, at) / price("resident", at);

    function fromAddress() {
      const asked = new URLSearchParams(location.hash.slice(1));
      for (const axis of AXES) {
        const wanted = asked.has(axis) ? Number(asked.get(axis)) : START[axis];
        const found = grid.axes[axis].indexOf(wanted);
        places[axis] = found >= 0 ? found : Math.max(0, grid.axes[axis].indexOf(START[axis]));
      }
      if (AXES.includes(asked.get("axis"))) moved = asked.get("axis");
    }

    function address() {
      const state = new URLSearchParams(AXES.map((axis) => [axis, grid.axes[axis][places[axis]]]));
      state.set("axis", moved);
      return `#${state}`;
    }

    const controls = {};
    const form = make("form", { class: "controls" });
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const axis of AXES) {
      const input = make("input", { type: "range", id: `in-${axis}`, min: 0, max: grid.axes[axis].length - 1, step: 1 });
      const output = make("output", { for: `in-${axis}` });
      input.addEventListener("input", () => {
        places[axis] = Number(input.value);
        moved = axis;
        show();
        history.replaceState(null, "", address());
      });
      form.append(make("div", { class: "control" }, make("label", { for: `in-${axis}` }, SAYS[axis].title), output, input));
      controls[axis] = { input, output };
    }

    const badge = make("strong", { class: "badge" });
    const reason = make("span", { class: "reason" });
    const prefetch = make("dd", {});
    const naive = make("dd", {});
    const figures = make("dl", {},
      make("div", {}, make("dt", {}, "prefetch / resident"), prefetch),
      make("div", {}, make("dt", {}, "naive / resident"), naive));
    const below = make("p", { class: "below" });
    const readout = make("div", { class: "readout", "aria-live": "polite" }, make("p", {}, badge, reason), figures, below);
    const chart = make("div", { class: "chart-box" });
    const table = make("table", {});
    const details = make("details", {}, make("summary", {}, "The chart as a table"), table);
    const link = make("a", {}, "Link to this state");
    root.replaceChildren(form, readout, chart, details, make("p", {}, link,
      ` · ${count(grid.tokens)} tokens of ${grid.stream}`));

    function show() {
      for (const axis of AXES) {
        const text = SAYS[axis].text(grid.axes[axis][places[axis]]);
        controls[axis].input.value = places[axis];
        controls[axis].input.setAttribute("aria-valuetext", text);
        controls[axis].output.textContent = text;
      }
      const ratios = { prefetch: ratio("offload_prefetch", places), naive: ratio("offload_naive", places) };
      const [label, why] = classify(ratios.prefetch, grid.thresholds);
      badge.textContent = label;
      badge.className = `badge ${label.toLowerCase()}`;
      reason.textContent = ` ${why}`;
      prefetch.textContent = times(ratios.prefetch);
      naive.textContent = times(ratios.naive);
      const reads = grid.share_below[places.share][places.hot];
      below.textContent = `With this share and hot tier ${percent(reads)} of the lookups go to rows below the padding.`;
      link.href = address();
      Object.assign(root.dataset, { prefetch: ratios.prefetch, naive: ratios.naive, label, axis: moved });
      drawChart();
    }

    function drawChart() {
      const values = grid.axes[moved];
      const along = values.map((_, place) => ({ ...places, [moved]: place }));
      const at = (place) => (values.length > 1 ? 0.03 + (0.94 * place) / (values.length - 1) : 0.5);
      const series = (name, variant, style) => ({
        name, style, points: along.map((where, place) => ({ at: at(place), value: ratio(variant, where) })),
      });
      const { strong_below, win_up_to, loss_above } = grid.thresholds;
      window.EngramChart.draw(chart, {
        series: [series("naive / resident", "offload_naive", 2), series("prefetch / resident", "offload_prefetch", 1)],
        lines: [
          { value: strong_below, label: `${strong_below}× strong WIN below` },
          { value: win_up_to, label: `${win_up_to}× WIN up to here` },
          { value: loss_above, label: `${loss_above}× LOSS above` },
        ],
        ticks: values.map((value, place) => ({ at: at(place), label: SAYS[moved].short(value) })),
        xTitle: SAYS[moved].title, yTitle: "price / resident", current: at(places[moved]), format: times, tick: (v) => `${count(v)}×`,
        label: `Price against the resident table along ${SAYS[moved].title}; the table below holds the figures.`,
      });
      drawTable(values, along);
    }

    function drawTable(values, along) {
      const head = ["prefetch / resident", "naive / resident", "class"].map((text) => make("th", { scope: "col" }, text));
      const rows = along.map((where, place) => {
        const found = ratio("offload_prefetch", where);
        const cells = [times(found), times(ratio("offload_naive", where)), classify(found, grid.thresholds)[0]];
        const row = make("tr", {}, make("th", { scope: "row" }, SAYS[moved].text(values[place])), ...cells.map((c) => make("td", {}, c)));
        if (place === places[moved]) row.className = "here";
        return row;
      });
      const corner = make("th", { scope: "col" }, SAYS[moved].title);
      table.replaceChildren(make("thead", {}, make("tr", {}, corner, ...head)), make("tbody", {}, ...rows));
    }

    fromAddress();
    root.hidden = false;
    show();
    root.dataset.ready = "yes";
    addEventListener("hashchange", () => { fromAddress(); show(); });
    let drawn = root.clientWidth;
    addEventListener("resize", () => {
      if (root.clientWidth === drawn) return;
      drawn = root.clientWidth;
      drawChart();
    });
  }

  const root = document.getElementById("explorer");
  if (window.engramGrid) explorer(root, window.engramGrid);
  else {
    root.hidden = false;
    root.textContent = "The prices of the grid have not been computed in this copy: bench/results/bytedmd_grid.json is missing.";
  }
})();
