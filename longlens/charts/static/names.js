// What widgets of explorers begin with: names for the handles of the sliders beside them, which ipywidgets leaves without one.
function nameHandles(el) {    // of the app that an element is in, once it stands in the page
  for (const wait of [300, 2000]) setTimeout(() => {
    for (const handle of el.closest(".lx-app")?.querySelectorAll(".noUi-handle:not([aria-label])") ?? []) {
      const slider = handle.closest(".jupyter-widgets"), name = slider?.querySelector(".widget-label")?.textContent || "slider";
      const two = slider?.querySelectorAll(".noUi-handle").length > 1, end = handle.classList.contains("noUi-handle-upper") ? "last" : "first";
      handle.setAttribute("aria-label", two ? `${name}, ${end}` : name);
    }
  }, wait);
}
