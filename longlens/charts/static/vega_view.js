// Draws a Vega-Lite chart that says which mark was clicked, and takes new rows without being drawn anew.
// Vega comes from the kernel, once a page: nothing is loaded from a network, and no widget carries a copy.
"use strict";
const NAME = "longlensVegaEmbed";    // set by the bundle that the kernel sends
const WAITING = Symbol.for("longlens.vega");
const STEP = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1]};

const library = (model) => globalThis[WAITING] ??= new Promise((resolve, reject) => {
  if (globalThis[NAME] ?? globalThis.vegaEmbed) return resolve(globalThis[NAME] ?? globalThis.vegaEmbed);
  const take = (message, buffers) => {
    if (message?.kind !== "vega") return;
    model.off("msg:custom", take);
    const url = URL.createObjectURL(new Blob([buffers[0]], {type: "text/javascript"}));
    import(url).then(() => resolve(globalThis[NAME]), reject).finally(() => URL.revokeObjectURL(url));
  };
  model.on("msg:custom", take);
  model.send({kind: "vega"});
}).catch((error) => { delete globalThis[WAITING]; throw error; });

const plain = (value) => typeof value === "object" && value !== null ? JSON.stringify(value) : value;

function render({model, el}) {
  const place = document.createElement("div");
  place.className = "lx-chart";
  place.setAttribute("role", "group");
  el.append(place);
  let drawn = null, turn = 0, line = Promise.resolve();
  nameHandles(el);    // names.js

  const rows = () => {
    const picked = model.get("picked");
    return {...model.get("rows"), picked: Object.keys(picked).length ? [picked] : []};
  };

  // an SVG knows currentColor; a canvas has to be told which colour that is
  const inked = (spec) => ({...spec, config: JSON.parse(
    JSON.stringify(spec.config ?? {}).replaceAll("currentColor", getComputedStyle(place).color))});

  const pick = (datum) => {
    const fields = model.get("fields");
    if (!datum || !fields.length || fields.some((key) => datum[key] === undefined)) return;
    model.set("picked", Object.fromEntries(fields.map((key) => [key, plain(datum[key])])));
    model.save_changes();
  };

  // a picture of a fixed width that has no room scrolls, also with the keyboard, and a line above it says that there is more
  const cue = Object.assign(document.createElement("p"), {className: "lx-caption lx-cue cue", textContent: "This goes on to the right: scroll it sideways →"});
  const told = () => {
    const cut = place.scrollWidth > place.clientWidth + 1;
    place.tabIndex = cut || model.get("fields").length ? 0 : -1;
    if (cut === Boolean(cue.parentNode)) return;
    if (cut) place.before(cue); else cue.remove();
  };

  const draw = async () => {
    const mine = ++turn;
    if (!drawn) place.textContent = "Drawing…";
    try {
      const embed = await library(model);
      if (mine !== turn) return;
      drawn?.finalize();
      drawn = null;
      const spec = {...model.get("chart"), datasets: {...model.get("chart").datasets, ...rows()}};
      const renderer = model.get("renderer");
      const made = await embed(place, renderer === "canvas" ? inked(spec) : structuredClone(spec), {
        renderer, ast: true, mode: "vega-lite", actions: false, tooltip: {id: "longlens-tooltip", disableDefaultStyle: true}});
      if (mine !== turn) return made.finalize();
      drawn = made;
      const label = model.get("label"), chosen = model.get("fields").length && !label.includes("arrow keys");
      const name = label + (chosen ? ": arrow keys choose" : ""), about = model.get("chart").description ?? "";
      place.setAttribute("aria-label", [name, about === label ? "" : about].filter(Boolean).join(". "));    // Vega has put its own there
      drawn.view.addEventListener("click", (event, item) => pick(item?.datum));
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
    }
    told();
    place.dataset.drawn = String(mine);
  };

  const refresh = async () => {
    if (!drawn) return;
    for (const [name, values] of Object.entries(rows())) {
      try { drawn.view.data(name, structuredClone(values)); } catch { /* this chart does not draw these rows */ }
    }
    await drawn.view.runAsync();
    place.dataset.refreshed = String(Number(place.dataset.refreshed ?? 0) + 1);
  };

  const next = (job) => { line = line.then(job, job); };
  const on = {"change:chart": () => next(draw), "change:rows": () => next(refresh), "change:picked": () => next(refresh)};
  for (const [event, does] of Object.entries(on)) model.on(event, does);
  next(draw);

  // what can be picked, where it is drawn: once for each choice, by its smallest mark (a rule through the whole chart is no place)
  const places = () => {
    const fields = model.get("fields"), found = new Map();
    const walk = (item, x, y) => {
      if (item.marktype) return item.items.forEach((inside) => walk(inside, x, y));
      if (item.items) return item.items.forEach((inside) => walk(inside, x + (item.x ?? 0), y + (item.y ?? 0)));
      const {datum, bounds} = item;
      if (!datum || fields.some((key) => datum[key] === undefined)) return;
      const [wide, high] = bounds ? [bounds.width(), bounds.height()] : [0, 0], values = fields.map((key) => plain(datum[key]));
      const at = bounds ? [x + (bounds.x1 + bounds.x2) / 2, y + (bounds.y1 + bounds.y2) / 2] : [x + (item.x ?? 0), y + (item.y ?? 0)];
      const key = JSON.stringify(values), size = wide + high;
      if (!(found.get(key)?.size <= size)) found.set(key, {values, at, size});
    };
    walk(drawn.view.scenegraph().root, 0, 0);
    return found;
  };

  // the nearest mark in a direction; without a choice yet, the first one
  const neighbour = ([axis, by]) => {
    const fields = model.get("fields"), picked = model.get("picked"), all = places();
    const here = all.get(JSON.stringify(fields.map((key) => picked[key])));
    if (!here) return all.values().next().value;
    const cost = ({at}) => by * (at[axis] - here.at[axis]) + 3 * Math.abs(at[1 - axis] - here.at[1 - axis]);
    const ahead = [...all.values()].filter(({at}) => by * (at[axis] - here.at[axis]) > 0.5);
    return ahead.length ? ahead.reduce((a, b) => cost(b) < cost(a) ? b : a) : here;
  };

  // arrow keys move the picked mark along the two axes, or to the next mark that is drawn
  place.addEventListener("keydown", (event) => {
    const step = STEP[event.key], steps = model.get("steps"), fields = model.get("fields");
    if (!step || !fields.length || !drawn) return;
    const [axis, by] = step, now = {...model.get("picked")};
    if (!steps.length) {
      event.preventDefault();
      const next = neighbour(step);
      if (next) pick(Object.fromEntries(fields.map((key, i) => [key, next.values[i]])));
      return;
    }
    if (axis >= steps.length) return;
    const at = steps[axis].indexOf(now[fields[axis]]);
    fields.forEach((key, i) => { now[key] ??= steps[i][0]; });
    now[fields[axis]] = steps[axis][Math.min(Math.max(at + by, 0), steps[axis].length - 1)];
    event.preventDefault();
    pick(now);
  });

  const seen = new MutationObserver(() => { if (model.get("renderer") === "canvas") next(draw); });
  // Vega asks how wide its place is when it draws, and when the window changes: a place that is shown later, or in a new row, is neither
  const fit = async () => {
    const wide = drawn?.view.container()?.clientWidth;
    if (wide && model.get("chart").width === "container" && drawn.view.signal("width") !== wide) await drawn.view.signal("width", wide).runAsync();
    told();
  };
  const sized = new ResizeObserver(() => next(fit));
  sized.observe(place);

  seen.observe(document.body, {attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name"]});

  return () => {
    turn++;
    seen.disconnect();
    sized.disconnect();
    for (const [event, does] of Object.entries(on)) model.off(event, does);
    drawn?.finalize();
  };
}

export default {render};
