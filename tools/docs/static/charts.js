// Draws the charts of a page from the specifications beside them. Ink is the page's own colour, so that both themes work.
"use strict";
window.longlens = (() => {
  const options = {
    ast: true, mode: "vega-lite", actions: {export: true, source: false, compiled: false, editor: false},
    tooltip: {disableDefaultStyle: true}, downloadFileName: "longlens",
  };
  const MANY = 3000;    // rows: above this a chart is drawn on a canvas, which is faster, below it as SVG
  const canvases = new Map();

  const rows = (spec) => Math.max(0, ...Object.values(spec.datasets ?? {}).map((data) => data.length));

  // an SVG knows currentColor; a canvas has to be told which colour that is
  const config = (place, renderer) => renderer === "svg" ? window.longlensPage : JSON.parse(
    JSON.stringify(window.longlensPage).replaceAll("currentColor", getComputedStyle(place).color));

  const READABLE = 9;    // pixels: letters of a chart are not made smaller than that
  const fitted = (svg) => {
    const letters = [...svg.querySelectorAll("text")].map((t) => t.textContent.trim() ? parseFloat(t.getAttribute("font-size")) : 0);
    const least = Math.min(1, READABLE / Math.min(...letters.filter((size) => size > 0)));
    svg.classList.add("fitted");    // and no chart inside a widget, which has its own ways
    svg.style.minWidth = `${Math.ceil(least * svg.width.baseVal.value)}px`;
  };

  // a chart that is still too wide can be scrolled, also with the keyboard, and a line above it says that there is more
  const told = (place) => {
    const cut = place.scrollWidth > place.clientWidth + 1;
    if (cut === place.classList.contains("cut")) return;
    place.classList.toggle("cut", cut);
    if (!cut) { place.removeAttribute("tabindex"); place.previousElementSibling.remove(); return; }
    place.tabIndex = 0;
    const textContent = "This goes on to the right: scroll it sideways \u2192";
    place.before(Object.assign(document.createElement("p"), {className: "cue", textContent}));
  };
  const sizes = new ResizeObserver((seen) => seen.forEach(({target}) => told(target)));

  const draw = async (place, spec) => {
    const renderer = rows(spec) > MANY ? "canvas" : "svg";
    try {
      await vegaEmbed(place, spec, {...options, renderer, config: config(place, renderer)});
      place.querySelectorAll("summary").forEach((menu) => menu.setAttribute("aria-label", "Save this chart"));    // it has a picture only
      place.querySelectorAll("svg.marks").forEach(fitted);
      told(place);
      sizes.observe(place);
      place.dataset.drawn = renderer;
      if (renderer === "canvas") canvases.set(place, spec);
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    }
  };

  const stored = (place) => JSON.parse(place.querySelector("script").textContent);
  const again = () => canvases.forEach((spec, place) => draw(place, spec));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  new MutationObserver(again).observe(document.body, {attributes: true, attributeFilter: ["data-theme"]});

  const all = [...document.querySelectorAll("[data-chart]")];
  const one = (rest) => { if (rest.length) draw(rest[0], stored(rest[0])).then(() => setTimeout(one, 0, rest.slice(1))); };
  one(all);
  document.querySelectorAll("[data-widget]").forEach((place) => sizes.observe(place));
  return {draw, stored};
})();
