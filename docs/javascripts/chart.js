// A line chart on a logarithmic scale, as SVG with the page's own colours; no library, no network.
//
//   EngramChart.draw(element, { series, lines, ticks, xTitle, yTitle, current, label, format, tick })
//
// series  [{ name, style: 1..5, points: [{ at: 0..1, value }] }]     at: the place on the x axis
// lines   [{ value, label }]                                        horizontal, dashed
// ticks   [{ at: 0..1, label }]                                     of the x axis
// current 0..1 or null                                              a vertical line at the point that is shown
// format, tick                                                      a value in words: of a point, and of the y axis
(function () {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 300;
  const LETTER = 7.2; // width of a character at 12 px, or a little more

  function node(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Powers of ten times 1, 2 and 5 inside the range: few enough to read, close enough for a narrow range.
  function valueTicks(low, high) {
    const steps = high / low > 1000 ? [1] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const step of steps) {
        const value = step * 10 ** power;
        if (value >= low && value <= high) found.push(+value.toPrecision(3));
      }
    return found;
  }

  function range(chart) {
    const values = chart.series.flatMap((s) => s.points.map((p) => p.value));
    const all = values.concat(chart.lines.map((line) => line.value)).filter((value) => value > 0);
    return [Math.min(...all) / 1.15, Math.max(...all) * 1.15];
  }

  const SHAPES = {
    1: (x, y) => node("circle", { cx: x, cy: y, r: 4.5 }),
    2: (x, y) => node("rect", { x: x - 4, y: y - 4, width: 8, height: 8 }),
    3: (x, y) => node("path", { d: `M${x} ${y - 5.5}l5 9h-10z` }),
    4: (x, y) => node("path", { d: `M${x} ${y - 6}l6 6l-6 6l-6-6z` }),
    5: (x, y) => node("path", { d: `M${x} ${y + 5.5}l5-9h-10z` }),
  };

  function draw(element, chart) {
    const width = Math.max(280, element.clientWidth || 640);
    const [low, high] = range(chart);
    const ticks = valueTicks(low, high);
    const left = Math.max(...ticks.map((value) => chart.tick(value).length)) * LETTER + 10;
    const box = { left, right: width - 14, top: 28, bottom: HEIGHT - 50 };
    const x = (at) => box.left + at * (box.right - box.left);
    const y = (value) => box.bottom - ((box.bottom - box.top) * Math.log(value / low)) / Math.log(high / low);
    const svg = node("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", class: "chart" });
    svg.setAttribute("aria-label", chart.label);
    svg.append(node("text", { x: 0, y: 12 }, chart.yTitle), node("text", { x: x(0.5), y: HEIGHT - 10, "text-anchor": "middle" }, chart.xTitle));
    for (const value of ticks) {
      svg.append(level(box, y(value), "grid"));
      svg.append(node("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, chart.tick(value)));
    }
    placeTicks(svg, chart.ticks, x, box, width);
    if (chart.current !== null)
      svg.append(node("line", { x1: x(chart.current), x2: x(chart.current), y1: box.top, y2: box.bottom, class: "current" }));
    for (const line of chart.lines) svg.append(level(box, y(line.value), "threshold"));
    for (const series of chart.series) drawSeries(svg, series, x, y, chart.format);
    for (const line of chart.lines)
      svg.append(node("text", { x: box.right, y: y(line.value) - 4, "text-anchor": "end", class: "threshold-label" }, line.label));
    element.replaceChildren(svg, legend(chart.series));
  }

  const level = (box, y, kind) => node("line", { x1: box.left, x2: box.right, y1: y, y2: y, class: kind });

  // Labels that would run into each other are left out, every other one, until the rest fit.
  function placeTicks(svg, ticks, x, box, width) {
    const longest = Math.max(...ticks.map((tick) => tick.label.length)) * LETTER + 8;
    const every = Math.ceil((longest * (ticks.length - 1)) / (box.right - box.left));
    ticks.forEach((tick, number) => {
      const at = x(tick.at);
      svg.append(node("line", { x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4, class: "axis" }));
      if ((ticks.length - 1 - number) % every) return;
      const half = (tick.label.length * LETTER) / 2;
      const middle = Math.min(at, width - half);
      svg.append(node("text", { x: middle, y: box.bottom + 18, "text-anchor": "middle" }, tick.label));
    });
  }

  function drawSeries(svg, series, x, y, format) {
    const group = node("g", { class: `series style-${series.style}` });
    const points = series.points.filter((point) => point.value > 0);
    group.append(node("polyline", { points: points.map((p) => `${x(p.at)},${y(p.value)}`).join(" ") }));
    for (const point of points) {
      const mark = SHAPES[series.style](x(point.at), y(point.value));
      mark.append(node("title", {}, `${series.name}: ${format(point.value)}`));
      group.append(mark);
    }
    svg.append(group);
  }

  function legend(series) {
    const list = document.createElement("ul");
    list.className = "legend";
    for (const { name, style } of series) {
      const item = document.createElement("li");
      const swatch = node("svg", { width: 28, height: 12, "aria-hidden": "true", class: "chart" });
      const group = node("g", { class: `series style-${style}` });
      group.append(node("polyline", { points: "0,6 28,6" }), SHAPES[style](14, 6));
      swatch.append(group);
      item.append(swatch, name);
      list.append(item);
    }
    return list;
  }

  window.EngramChart = { draw };
})();
