// The page "How ByteDMD works": draws the steps that bench/site/stack_story.py wrote down. Nothing is priced here.
//
// Data: window.engramStackStories. A story with n steps has 2n + 1 frames: the stack at rest, what the next instruction
// reads, the stack after it, and so on. The address holds story and frame.
(function () {
  "use strict";
  const stories = window.engramStackStories;
  const root = document.getElementById("stack-story");
  const BOX = 30, PAD = 7, GAP = 3;
  let story = stories[0], frame = 0, timer = null;

  function make(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  const button = (text, act) => {
    const made = make("button", { type: "button" }, text);
    made.addEventListener("click", act);
    return made;
  };

  const choice = make("div", { class: "stories", role: "group", "aria-label": "Program" });
  for (const one of stories) {
    const made = button(one.title, () => go(one, 0));
    made.dataset.story = one.name;
    choice.append(made);
  }
  const back = button("Back", () => { stop(); go(story, frame - 1); });
  const next = button("Next", () => { stop(); go(story, frame + 1); });
  const play = button("Play", () => (timer ? stop() : start()));
  const place = make("span", { class: "place" });
  const stack = make("div", { class: "stack", role: "img" });
  const text = make("div", { class: "telling", "aria-live": "polite" });
  root.append(choice, make("div", { class: "steps" }, back, next, play, place), make("div", { class: "scene" }, stack, text));

  const frames = () => 2 * story.steps.length;
  const step = () => (frame % 2 ? story.steps[(frame - 1) / 2] : null); // the one whose reads are shown
  const lying = () => (frame < 2 ? story.start : story.steps[Math.floor(frame / 2) - 1].stack);
  const total = () => story.steps.slice(0, Math.ceil(frame / 2)).flatMap((s) => s.reads).reduce((sum, r) => sum + r.price, 0);
  const name = (value) => story.values[value].name;

  function go(chosen, wanted) {
    if (chosen !== story) { stop(); stack.replaceChildren(); }
    story = chosen;
    frame = Math.max(0, Math.min(wanted, frames()));
    show();
    history.replaceState(null, "", `#story=${story.name}&frame=${frame}`);
  }
  function start() {
    if (frame === frames()) go(story, 0);
    play.textContent = "Pause";
    timer = setInterval(() => { if (frame < frames()) go(story, frame + 1); else stop(); }, 1600);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  function show() {
    for (const made of choice.children) made.setAttribute("aria-pressed", made.dataset.story === story.name);
    back.disabled = frame === 0;
    next.disabled = frame === frames();
    place.textContent = `step ${Math.ceil(frame / 2)} of ${story.steps.length}`;
    drawStack();
    text.replaceChildren(...telling());
    Object.assign(root.dataset, { story: story.name, frame, total: total(), price: story.price, ready: "yes" });
  }

  function drawStack() {
    const reads = new Map((step() ? step().reads : []).map((read) => [read.value, read]));
    const known = new Map([...stack.children].map((box) => [Number(box.dataset.value), box]));
    let top = 0;
    lying().forEach((value, place) => {
      const padding = story.values[value].padding;
      const box = known.get(value) || newBox(value);
      known.delete(value);
      box.style.transform = `translateY(${top}px)`;
      box.classList.toggle("read", reads.has(value));
      box.querySelector(".depth").textContent = padding ? "" : place + 1;
      box.querySelector(".price").textContent = reads.has(value) ? `⌈√${reads.get(value).depth}⌉ = ${reads.get(value).price}` : "";
      top += (padding ? PAD : BOX) + GAP;
    });
    for (const box of known.values()) box.remove();
    stack.style.height = `${tallest()}px`;
    stack.setAttribute("aria-label", `Stack from the top: ${summary()}`);
  }

  function newBox(value) {
    const padding = story.values[value].padding;
    const box = make("div", { class: padding ? "box padding" : "box" },
      make("span", { class: "depth" }), make("span", { class: "name" }, padding ? "" : name(value)), make("span", { class: "price" }));
    box.dataset.value = value;
    stack.append(box);
    return box;
  }

  // Room for the fullest stack of the story, so that nothing below it jumps.
  function tallest() {
    const heights = [story.start, ...story.steps.map((s) => s.stack)].map((values) =>
      values.reduce((sum, value) => sum + (story.values[value].padding ? PAD : BOX) + GAP, 0));
    return Math.max(...heights);
  }

  function summary() {
    const parts = [];
    for (const value of lying()) {
      if (!story.values[value].padding) parts.push(name(value));
      else if (parts[parts.length - 1] !== "padding") parts.push("padding");
    }
    return parts.join(", ");
  }

  function telling() {
    const said = [];
    const current = step();
    if (frame === 0) said.push(make("p", {}, "The stack before the first instruction, the top above. ",
      story.values.some((value) => value.padding) ? `The thin lines are ${story.values.filter((v) => v.padding).length} values of padding.` : ""));
    else if (current) {
      said.push(make("p", {}, make("strong", {}, name(current.result)), " reads:"));
      said.push(make("ul", {}, ...current.reads.map((r) => make("li", {}, `${name(r.value)} at depth ${r.depth}: ⌈√${r.depth}⌉ = ${r.price}`))));
    } else said.push(make("p", {}, make("strong", {}, name(story.steps[frame / 2 - 1].result)), " is stored on top, for nothing."));
    said.push(make("p", { class: "total" }, "price so far: ", make("strong", {}, String(total()))));
    if (frame === frames()) said.push(make("p", { class: "moral" }, story.moral));
    if (frame === frames()) said.push(make("p", {}, "All programs: ", stories.map((s) => `${s.title}: ${s.price}`).join("; "), "."));
    return said;
  }

  function fromAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const chosen = stories.find((one) => one.name === asked.get("story"));
    if (!chosen) return false;
    if (chosen !== story) stack.replaceChildren();
    story = chosen;
    frame = Math.max(0, Math.min(Math.trunc(Number(asked.get("frame"))) || 0, frames()));
    return true;
  }

  fromAddress();
  root.hidden = false;
  show();
  addEventListener("hashchange", () => { if (fromAddress()) { stop(); show(); } });
})();
