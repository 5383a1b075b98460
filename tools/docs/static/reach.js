// What goes on to the right can be scrolled with the keyboard: it can be focused while it is wider than its place.
"use strict";
(() => {
  const told = (place) => {
    if (place.scrollWidth > place.clientWidth + 1) place.tabIndex = 0;
    else place.removeAttribute("tabindex");
  };
  const sizes = new ResizeObserver((seen) => seen.forEach(({target}) => told(target)));
  document.querySelectorAll(".highlight pre, div.output.html, .table-wrapper, dt.sig").forEach((place) => { told(place); sizes.observe(place); });
})();
