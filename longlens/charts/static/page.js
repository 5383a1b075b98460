// Draws the charts of a report page. Vega's expressions are interpreted (ast), so the page needs no eval; the specs are data.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const options = {
    ast: true, mode: "vega-lite", actions: {export: true, source: false, compiled: false, editor: false},
    tooltip: {disableDefaultStyle: true}, downloadFileName: "longlens",
  };

  // an SVG knows currentColor; a canvas has to be told which colour that is
  const inked = (spec, place) => ({...spec, config: JSON.parse(
    JSON.stringify(spec.config).replaceAll("currentColor", getComputedStyle(place).color))});

  const draw = async (place) => {
    const {spec, renderer} = charts[Number(place.dataset.chart)];
    try {
      await vegaEmbed(place, renderer === "canvas" ? inked(spec, place) : spec, {...options, renderer});
      place.querySelectorAll("summary").forEach((menu) => menu.setAttribute("aria-label", "Save this chart"));    // it has a picture only
      const svg = place.querySelector("svg.marks");    // smaller where there is no room, but not so small that nobody reads it
      if (svg) svg.style.minWidth = `${0.75 * svg.width.baseVal.value}px`;
      place.dataset.drawn = renderer;
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    }
  };

  const all = [...document.querySelectorAll("[data-chart]")];
  const one = (rest) => { if (rest.length) draw(rest[0]).then(() => setTimeout(one, 0, rest.slice(1))); };
  one(all);

  // what is linked to is unfolded, and so is everything where the page is printed
  const unfold = (place) => { for (let e = place; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true; };
  const arrive = () => {
    const place = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (place) { unfold(place); place.scrollIntoView(); }
  };
  addEventListener("hashchange", arrive);
  document.addEventListener("click", (e) => {    // also a link to where one already is
    const link = e.target.closest?.("a[href^='#']");
    if (link && link.getAttribute("href") === location.hash) arrive();
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details.report").forEach((d) => { d.open = true; }));
  arrive();

  // an SVG follows the colours of the page by itself; a canvas has to be drawn again
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
    () => all.filter((place) => place.dataset.drawn === "canvas").forEach(draw));
})();
