// What scrolls can be reached with the keyboard and has a name: wide tables, long lines of code, wide figures.
(function () {
  "use strict";
  const SCROLLS = ".md-typeset__scrollwrap, .md-typeset pre > code, .md-typeset p:has(> img:only-child)";

  function heading(element) {
    const before = [...document.querySelectorAll(".md-content h1, .md-content h2, .md-content h3, .md-content h4")]
      .filter((h) => h.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING);
    return before.length ? before[before.length - 1].firstChild.textContent.trim() : document.title;
  }

  function look() {
    document.querySelectorAll(SCROLLS).forEach((element, number) => {
      if (element.scrollWidth <= element.clientWidth) return element.removeAttribute("tabindex");
      element.tabIndex = 0;
      element.setAttribute("role", "group");
      element.setAttribute("aria-label", `${heading(element)}, scrolls (${number + 1})`);
    });
    // The theme's own: a landmark for each button that copies a block of code.
    document.querySelectorAll(".md-code__nav").forEach((nav) => nav.setAttribute("role", "presentation"));
  }

  addEventListener("load", () => setTimeout(look)); // after the theme has wrapped the tables
  addEventListener("resize", () => requestAnimationFrame(() => setTimeout(look))); // and after it has looked itself
})();
