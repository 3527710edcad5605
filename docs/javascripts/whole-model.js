// Second panel of "Explore": the price of a step's rows against that of the model's weights, by tokens per step.
//
// Data: window.engramWholeModel (docs/assets/whole_model.js), or null, and then nothing is shown.
(function () {
  "use strict";
  const data = window.engramWholeModel;
  if (!data) return;
  const root = document.getElementById("whole-model-panel");
  const SAYS = {
    "held live": "held live: all of it on the stack",
    compacted: "compacted: rows not read again take no room",
    "python-stdlib": "Python's standard library",
    uniform: "uniform random ids",
  };
  const count = (value) => Math.round(value).toLocaleString("en-US");
  const percent = (share) => `${+(100 * share).toPrecision(2)} %`;

  function make(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // A choice, where there is one.
  function choice(key, title) {
    const values = [...new Set(data.whole_model.map((curve) => curve[key]))];
    const select = make("select", { id: `whole-${key}` }, ...values.map((value) => make("option", { value }, SAYS[value] || value)));
    select.addEventListener("change", show);
    const field = make("div", { class: "control" }, make("label", { for: `whole-${key}` }, title), select);
    field.hidden = values.length < 2;
    return { select, field, fits: (curve) => curve[key] === select.value };
  }

  const choices = [choice("mode", "Step"), choice("stream", "Text"), choice("layout", "Table")];
  const chart = make("div", { class: "chart-box" });
  const crossings = make("ul", { class: "crossings", "aria-live": "polite" });
  root.append(
    make("h2", { id: "the-whole-model" }, "The whole model"),
    make("p", {}, "At production scale the denominator is a forward pass. A step reads every active weight once, whatever "
      + "the batch, and every token adds its rows, which lie below the weights. Weights are priced from below and "
      + "activations are free, so the true share is smaller. These are the rows alone; Engram's own weights, which every "
      + "step reads, too, add to them, and the paper's claim is about all of it. The line is as high as that claim."),
    make("form", { class: "controls" }, ...choices.map((one) => one.field)), chart, crossings);

  function show() {
    const curves = data.whole_model.filter((curve) => choices.every((one) => one.fits(curve)));
    crossings.replaceChildren(...(curves.length ? curves.map(crossing) : [make("li", {}, "Not computed.")]));
    if (!curves.length) return chart.replaceChildren();
    const all = curves.flatMap((curve) => curve.tokens);
    const low = Math.log10(Math.min(...all)), high = Math.log10(Math.max(...all));
    const at = (tokens) => (high > low ? 0.03 + (0.94 * (Math.log10(tokens) - low)) / (high - low) : 0.5);
    const ticks = [];
    for (let power = Math.ceil(low); power <= Math.floor(high + 1e-9); power++)
      ticks.push({ at: at(10 ** power), label: count(10 ** power) });
    window.EngramChart.draw(chart, {
      series: curves.map((curve, number) => ({
        name: `${curve.model}, ${curve.table}`, style: 1 + (number % 5),
        points: curve.tokens.map((tokens, place) => ({ at: at(tokens), value: curve.share[place] })),
      })),
      lines: [{ value: data.claim, label: `${percent(data.claim)}, by the rows alone` }],
      ticks, xTitle: "tokens per step", yTitle: "price of the rows / price of the weights", current: null, format: percent, tick: percent,
      label: "Price of the rows against that of the weights, by tokens per step; the list below names the crossings.",
    });
  }

  function crossing(curve) {
    const where = curve.crossing_3_percent;
    const text = where === null ? `stays under ${percent(data.claim)} in the range shown.` : `reaches ${percent(data.claim)} at about ${count(+where.toPrecision(3))} tokens per step, interpolated.`;
    return make("li", {}, make("strong", {}, `${curve.model}, ${curve.table}`), `: ${text}`);
  }

  root.hidden = false;
  show();
  root.dataset.ready = "yes";
  let drawn = root.clientWidth;
  addEventListener("resize", () => {
    if (root.clientWidth === drawn) return;
    drawn = root.clientWidth;
    show();
  });
})();
