// A long text drawn a screen at a time, every unit of it (a token, a source) shaded by a value.
// The same code draws the notebook's widget (`render`, for anywidget) and the report page (`mountAll`).
// Text from outside reaches the document as text nodes only, and what cannot be seen in it is written out.

const FOLD = 400, KEPT = 160, MORE = 4000;    // characters: longer units or words are folded, so many stay, a click shows more
const WIDEST = 400;       // characters in one line at most: marks without width would never fill it
const TALL = 8e6;         // pixels: taller elements are not reliable, so beyond this the scroll bar is scaled
const SPARE = 8;          // lines drawn above and below what can be seen
const MOST = 100000;      // matches that are counted
const LONG = 2000;        // characters of a question or an answer that are shown
const BINS = 160;         // of the map beside the text
const SLICE = 12;         // milliseconds of layout at a time
const LONGEST = 64;       // UTF-16 units of one character, and tokens of one box, at most
const INKS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999"];

// ---- characters

const SIGNS = {"\n": "⏎", "\t": "⇥"};
const UNSEEN = "\\p{C}\\p{Zl}\\p{Zp}\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u2800\\u3164\\uffa0\\ufe00-\\ufe0d\\u{e0100}-\\u{e01ef}";
const LETTERS = "[\\u0590-\\u109f\\u1780-\\u18af\\ua800-\\uabff]";    // of scripts that are written with joiners
const KEEP = `(?<=[\\p{Extended_Pictographic}\\p{Emoji_Modifier}\\ufe0f])\\u200d(?=\\p{Extended_Pictographic})|(?<=${LETTERS})[\\u200c\\u200d](?=${LETTERS})`
  + "|(?<=\\u{1f3f4})[\\u{e0020}-\\u{e007e}]{1,6}\\u{e007f}";    // joiners and tags that are part of a character or a word
const HIDDEN = new RegExp(`(${KEEP})|[${UNSEEN}]|(?! )\\p{Zs}`, "gu");    // the first group is drawn as it is
const MARK = /^\p{M}/u;

const hex = (n, digits) => n.toString(16).padStart(digits, "0");

function sign(char) {    // of a character that is not drawn by itself: as Python would write it
  const n = char.codePointAt(0);
  return SIGNS[char] ?? (n < 0x100 ? `\\x${hex(n, 2)}` : n < 0x10000 ? `\\u${hex(n, 4)}` : `\\U${hex(n, 8)}`);
}

export const seen = (text) => (MARK.test(text) ? "◌" : "") + text.replace(HIDDEN, (char, kept) => kept ?? sign(char));

export function visible(text, limit = 60) {    // the same as longlens.text.visible: one line for a label
  const points = [...text.slice(0, 2 * limit + 2)];
  const cut = points.length > limit;
  const begun = points.slice(0, limit).join(""), some = cut ? begun.replace(/ +$/, "") || begun : begun;    // no sign for the space before …
  const core = some.replace(/^ +| +$/g, "");
  const front = core ? some.length - some.replace(/^ +/, "").length : 0;
  return "␣".repeat(front) + seen(core) + "␣".repeat(some.length - front - core.length) + (cut ? "…" : "") || "(empty)";
}

// A character as readers count them can be several code points: a letter and its accents, a family, a flag
const clusters = new Intl.Segmenter("en", {granularity: "grapheme"});
const simple = (c) => c < 0x300 || (c >= 0x2e80 && c < 0xd7b0 && !(c >= 0x302a && c <= 0x302f) && c !== 0x3099 && c !== 0x309a);

function charEnd(text, i) {    // one past the character that starts at i
  const end = i + size(text, i);
  if (end >= text.length || simple(text.charCodeAt(end))) return end;    // nothing that follows belongs to it
  return i + clusters.segment(text.slice(i, i + LONGEST))[Symbol.iterator]().next().value.segment.length;
}

const STRONG = /\p{L}/u, RIGHT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]|[\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
const rightToLeft = (text) => RIGHT.test(STRONG.exec(text)?.[0] ?? "");    // by its first letter

// ---- numbers

const whole = new Intl.NumberFormat("en");
const number = (v) => !Number.isFinite(v) ? "–" : v === 0 ? "0" : Number.isInteger(v) && Math.abs(v) < 1e9 ? whole.format(v)
  : Math.abs(v) >= 1e6 || Math.abs(v) < 1e-4 ? v.toExponential(2) : String(Number(v.toPrecision(4)));

// A value as a share of the colour: 0 to 1, below 0 towards the other colour; NaN where nothing was measured
function share({kind, low, high}, v) {
  if (!Number.isFinite(v)) return NaN;
  if (kind === "diverging") return Math.max(-1, Math.min(1, v / high));
  const part = kind === "log" ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v - low) / (high - low);
  return Math.max(0, Math.min(1, part));
}

// ---- data: bytes come as DataViews from a kernel, and in base 64 from a page

function bytes(x) {
  if (typeof x === "string") {
    const text = atob(x), out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out.buffer;
  }
  return x.buffer.slice(x.byteOffset, x.byteOffset + x.byteLength);
}
const u32 = (x) => x === undefined || x === null ? null : new Uint32Array(bytes(x));
const f32 = (x) => x === undefined || x === null ? null : new Float32Array(bytes(x));

function string(x) {    // UTF-16 as it is: a TextDecoder would replace halves of pairs
  if (typeof x === "string") return x;
  const codes = new Uint16Array(bytes(x)), parts = [];
  for (let i = 0; i < codes.length; i += 8192) parts.push(String.fromCharCode.apply(null, codes.subarray(i, i + 8192)));
  return parts.join("");
}

const readContext = (c) => withBoxes({
  ...c, text: string(c.text), starts: u32(c.starts), ends: u32(c.ends), ids: u32(c.ids), empty: new Set(c.empty ?? []),
  places: (c.places ?? []).map((p) => ({name: p.name, from: u32(p.from), to: u32(p.to)})),
});

function withBoxes(c) {    // heads: the first unit of each unit's box; a box of one is a unit
  c.heads = Uint32Array.from(c.starts, (_, u) => u);
  for (const u of c.joined ?? []) {
    const head = c.heads[u - 1], part = c.starts[u] < c.ends[u - 1];    // a part of a character that has begun stays with it
    if (part || (u - head < LONGEST && c.ends[u] - c.starts[head] <= LONGEST)) c.heads[u] = head;
  }
  return c;
}
const readQuantity = (q) => ({...q, values: f32(q.values), errors: f32(q.errors)});

// ---- lines

class Ruler {    // widths of characters as they are shown; without kerning and ligatures they add up
  constructor(style) {
    this.pen = document.createElement("canvas").getContext("2d");
    this.pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    this.pen.fontKerning = "none";
    this.near = new Float32Array(65536).fill(-1);
    this.far = new Map();
  }

  measure(char) { return this.pen.measureText(seen(char)).width; }

  at(text, i, step = charEnd(text, i) - i) {    // width of the character that starts at i
    if (step > 1) {
      const char = text.slice(i, i + step);
      if (!this.far.has(char)) this.far.set(char, this.measure(char));
      return this.far.get(char);
    }
    const unit = text.charCodeAt(i);
    if (this.near[unit] < 0) this.near[unit] = this.measure(text[i]);
    return this.near[unit];
  }
}

const size = (text, i) => text.codePointAt(i) > 0xffff ? 2 : 1;

function foldsOf({text, starts, ends, unit}) {    // [from, to): what is not shown of words, and of tokens, that are too long
  const folds = [], close = (from, to) => { if (to - from > FOLD) folds.push({from: from + KEPT, to}); };
  const words = (from, to) => {
    let since = from;
    for (let i = from; i < to; i++) {
      const c = text.charCodeAt(i);
      if (c === 32 || c === 10 || c === 9) { close(since, i); since = i + 1; }
    }
    close(since, to);
  };
  let at = 0;
  for (let u = 0; u < starts.length; u++) {
    if (starts[u] - at > FOLD) words(at, starts[u]);
    if (ends[u] - starts[u] > FOLD) (unit === "token" ? close : words)(starts[u], ends[u]);
    at = ends[u];
  }
  if (text.length - at > FOLD) words(at, text.length);
  for (const f of folds) if (size(text, f.from - 1) === 2) f.from += 1;
  return folds;
}

const foldText = (f) => `… ${whole.format(f.to - f.from)} more characters`;

class Lines {    // where every line starts; made in slices, as far as it is needed
  constructor(context, folds, ruler, width) {
    Object.assign(this, {context, folds, ruler, width, starts: [0], at: 0, fold: 0, unit: 0});
  }

  get done() { return this.at >= this.context.text.length; }
  get count() { return this.done ? Math.max(1, this.starts.length - 1) : this.starts.length - 1; }
  get total() { return this.done ? this.count : Math.ceil(this.count * this.context.text.length / Math.max(1, this.at)); }
  end(line) { return this.starts[line + 1]; }

  next() {    // the end of the line that starts at this.at
    const {text, starts, ends} = this.context, from = this.at, n = starts.length;
    let x = 0, i = from, rest = -1;
    while (i < text.length) {
      if (this.fold < this.folds.length && i >= this.folds[this.fold].from) {
        const fold = this.folds[this.fold];
        const w = this.ruler.pen.measureText(foldText(fold)).width + 24;
        if (x + w > this.width && i > from) return i;
        [x, i, this.fold] = [x + w, fold.to, this.fold + 1];
        continue;
      }
      const c = text.charCodeAt(i);
      if (c === 10) return i + 1;
      while (this.unit < n && ends[this.unit] <= i) this.unit++;
      const parted = this.unit < n && (ends[this.unit] === i + 1 || starts[this.unit] === i + 1);    // half a pair in each of two tokens
      const step = parted ? 1 : charEnd(text, i) - i, w = this.ruler.at(text, i, step), space = c === 32 || c === 9;
      if (space && this.unit < n && starts[this.unit] === i) rest = i;    // a token keeps its leading space
      if ((x + w > this.width && i > from) || i - from >= WIDEST) return rest > from ? rest : i;
      [x, i] = [x + w, i + step];
      if ((space && rest !== i - 1) || c === 45 || c >= 0x2e80) rest = i;
    }
    return i;
  }

  step() {
    const fold = this.fold, end = this.next();
    if (this.fold > fold) while (this.fold > fold && this.folds[this.fold - 1].from >= end) this.fold--;
    while (this.unit > 0 && this.context.ends[this.unit - 1] > end) this.unit--;
    this.at = end;
    this.starts.push(end);
  }

  until(ready) { while (!this.done && !ready()) this.step(); }
  toLine(line) { this.until(() => this.starts.length > line + 1); }
  toChar(char) { this.until(() => this.at > char); }

  slice() {
    const stop = performance.now() + SLICE;
    while (!this.done && performance.now() < stop) for (let k = 0; k < 64 && !this.done; k++) this.step();
  }

  of(char) {    // the line of a character
    this.toChar(char);
    return Math.min(this.count - 1, Math.max(0, last(this.starts, char)));
  }
}

function last(sorted, value, n = sorted.length) {    // index of the last entry that is not above the value; -1: none
  let low = 0, high = n;
  while (low < high) { const mid = (low + high) >> 1; if (sorted[mid] <= value) low = mid + 1; else high = mid; }
  return low - 1;
}

// ---- elements

function make(tag, name, content, attributes = {}) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  if (content !== undefined && content !== null) e.textContent = content;
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  return e;
}

const option = (value, text) => make("option", "", text, {value});

function button(text, label, act, name = "") {
  const b = make("button", name, text, {type: "button", "aria-label": label, title: label});
  b.addEventListener("click", act);
  return b;
}

let views = 0;

// ---- the view

export class TextView {
  // settings: label, height (pixels), top (rows of the table), question, answer; tell: called with {selected, selection, quantity, span}
  constructor(place, context, settings, tell = () => {}) {
    this.id = `ll-tokens-${++views}`;
    Object.assign(this, {context, tell, settings, n: context.starts.length, folds: foldsOf(context), drawn: new Map()});
    Object.assign(this, {quantities: [], quantity: null, spans: [], spanOf: null, span: null, cursor: -1, selected: -1, range: null});
    Object.assign(this, {matches: [], match: -1, hover: -1, stamp: 0});
    this.build(place);
    this.watch = new ResizeObserver(() => this.resize());
    this.watch.observe(this.view);
  }

  destroy() {
    this.watch.disconnect();
    this.gone = true;
  }

  get word() { return this.context.unit; }
  number(u) { return whole.format(this.word === "source" ? u + 1 : u); }    // people count sources from 1, and positions are those of Python
  get words() { return `${this.word}${this.n === 1 ? "" : "s"}`; }

  build(place) {
    const {label, height} = this.settings;
    this.root = make("div", "ll-tokens", null, {role: "group", "aria-label": seen(label), "data-lm-suppress-shortcuts": "true", "data-unit": this.word});
    this.asked = make("div", "ll-asked");
    this.bar = make("div", "ll-bar");
    this.spanBar = make("div", "ll-bar ll-spans");
    this.view = make("div", "ll-view", null, {
      role: "listbox", tabindex: "0", "aria-label": `${seen(label)}: ${whole.format(this.n)} ${this.words}`, "aria-describedby": `${this.id}-keys`,
    });
    this.view.style.height = `${height}px`;
    this.tall = this.view.appendChild(make("div", "ll-tall", null, {role: "none"}));
    this.block = this.tall.appendChild(make("div", "ll-lines", null, {role: "none"}));
    this.map = make("div", "ll-map", null, {"aria-hidden": "true", title: "The whole text: click to go there"});
    this.here = make("div", "ll-here");
    const body = make("div", "ll-body");
    body.append(this.view, this.map);
    this.details = make("div", "ll-details");
    this.table = make("div", "ll-top");
    this.live = make("div", "ll-live", "", {"aria-live": "polite", role: "status"});
    const keys = make("div", "ll-live", `Arrow keys move from ${this.word} to ${this.word}, Enter selects, shift with an arrow key selects `
      + "several, slash searches, Home and End go to the ends.", {id: `${this.id}-keys`});
    this.buildBar();
    this.root.append(this.asked, this.bar, this.spanBar, body, this.details, this.table, this.live, keys);
    place.append(this.root);
    this.listen();
  }

  buildBar() {
    this.choice = make("select", "ll-quantity", null, {"aria-label": "Shaded by"});
    this.choice.addEventListener("change", () => { this.setQuantity(this.choice.value); this.tell({quantity: this.choice.value}); });
    this.legend = make("span", "ll-legend");
    this.search = make("input", "ll-search", null, {type: "search", placeholder: "Search  /", "aria-label": "Search the text", spellcheck: "false"});
    this.found = make("output", "ll-found", "", {"aria-live": "polite"});
    const find = make("span", "ll-find");
    find.append(this.search, button("↑", "Previous match", () => this.step(-1)), button("↓", "Next match", () => this.step(1)), this.found);
    const shaded = make("span", "ll-shaded");
    shaded.append(this.choice, this.legend);
    this.bar.append(shaded, find);
  }

  listen() {
    this.view.addEventListener("scroll", () => this.later());
    this.view.addEventListener("keydown", (e) => this.key(e));
    this.root.addEventListener("keydown", (e) => {
      if ((e.ctrlKey || e.metaKey) && e.key === "f") { e.preventDefault(); this.search.focus(); this.search.select(); }
    });
    this.view.addEventListener("mousemove", (e) => {    // browsers also tell when the text moves below a mouse that rests
      const at = `${e.clientX},${e.clientY}`;
      if (at !== this.mouse) { this.mouse = at; this.point(this.unitOf(e)); }
    });
    this.view.addEventListener("mouseleave", () => { if (!this.settings.links) this.point(-1); });    // links stay, to be clicked
    this.view.addEventListener("click", (e) => {
      const u = this.unitOf(e);
      if (e.target.dataset.fold) this.unfold(Number(e.target.dataset.fold));
      else if (u >= 0) this.choose(u, e.shiftKey);
    });
    this.map.addEventListener("click", (e) => {
      const box = this.map.getBoundingClientRect();
      this.show(Math.floor((e.clientY - box.top) / box.height * this.context.text.length));
    });
    this.search.addEventListener("input", () => { clearTimeout(this.typed); this.typed = setTimeout(() => this.find(), 120); });
    this.search.addEventListener("keydown", (e) => {
      if (e.key === "Enter") { clearTimeout(this.typed); if (this.search.value !== this.sought) this.find(); this.step(e.shiftKey ? -1 : 1); }
      else if (e.key === "Escape") { this.search.value = ""; this.find(); this.view.focus(); } else return;
      e.preventDefault();
    });
  }

  unitOf(e) {    // below the mouse; in a box, its part
    const at = e.target.closest("[data-u]");
    if (!at) return -1;
    const u = Number(at.dataset.u), box = at.getBoundingClientRect(), x = 100 * (e.clientX - box.left) / box.width;
    if (!at.dataset.stops) return u;
    const stops = at.dataset.stops.split(" ").map(Number).slice(1, -1), from = at.classList.contains("is-rtl") ? 100 - x : x;
    return u + stops.filter((p) => p <= from).length;
  }

  // -- what is set from outside

  setQuantities(list, name = this.quantity?.name) {
    this.quantities = list;
    this.choice.replaceChildren(...list.map((q) => option(q.name, seen(q.name))));
    this.choice.disabled = list.length < 2;
    this.choice.hidden = !list.length;
    this.setQuantity(name);
  }

  setQuantity(name) {
    this.quantity = this.quantities.find((q) => q.name === name) ?? this.quantities[0] ?? null;
    if (this.quantity) this.choice.value = this.quantity.name;
    this.drawLegend();
    this.drawMap();
    this.drawTable();
    this.drawAsked();
    this.redraw();
    if (this.word === "source" && this.quantity && this.n) this.show(this.context.starts[this.strongest()[0] ?? 0]);
  }

  setSpans(list) {
    this.spans = list.map((s, i) => ({...s, colour: s.colour || INKS[i % INKS.length]}));
    this.spanOf = new Int32Array(this.n).fill(-1);
    const order = this.spans.map((_, i) => i).sort((a, b) => (this.spans[b].end - this.spans[b].start) - (this.spans[a].end - this.spans[a].start));
    for (const i of order) this.spanOf.fill(i, this.spans[i].start, this.spans[i].end);    // the innermost last
    this.drawSpans();
    this.drawMap();
    this.redraw();
  }

  setSpan(name) {
    this.span = this.spans.find((s) => s.name === name) ?? null;
    for (const b of this.spanBar.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b.dataset.span === name));
    const list = this.spanBar.querySelector("select");
    if (list) list.value = this.span ? name : "";
    if (this.span) { [this.cursor, this.hover] = [this.span.start, -1]; this.show(this.context.starts[this.span.start]); this.tellDetails(true); }
    this.redraw();
  }

  select(u) {    // from outside: nothing is told
    this.selected = u >= 0 && u < this.n ? u : -1;
    this.range = null;
    if (u >= 0) { this.cursor = u; this.show(this.context.starts[u]); }
    this.redraw();
    this.tellDetails(false);
  }

  choose(u, extend = false) {    // by hand
    clearTimeout(this.resting);
    const from = extend && this.selected >= 0 ? this.selected : u;
    this.range = from === u ? null : [Math.min(from, u), Math.max(from, u) + 1];
    [this.cursor, this.selected] = [u, from];
    this.redraw();
    this.tellDetails(true);
    this.tell({selected: from, selection: this.range ?? [u, u + 1]});
  }

  // -- where a token looks, and who looks at it: asked of the kernel for the token below the mouse, or else the cursor

  askLinks(u) {
    if (!this.settings.links || u === this.linksOf) return;
    this.linksOf = u;
    if (this.links) { this.links = null; this.redraw(); }
    clearTimeout(this.asking);
    this.asking = setTimeout(() => !this.gone && this.tell({hovered: u}), 60);
  }

  setLinks(l) {    // {unit, to: [units, weights], from: the same, note}; what is no longer asked for is left alone
    if (!l || l.unit !== this.linksOf) return;
    const scaled = ([units, weights]) => new Map(units.map((u, i) => [u, Math.sqrt(weights[i] / (weights[0] || 1))]));
    this.links = {...l, strong: [scaled(l.to), scaled(l.from)]};
    this.redraw();
    this.tellDetails(false);
  }

  linkMark(e, u, v) {    // a line below what is looked at, above who looks
    const names = ["to", "from"];
    for (const [k, strong] of this.links.strong.entries()) {
      let most = 0;
      for (let i = u; i < v; i++) most = Math.max(most, strong.get(i) ?? 0);
      if (most < 0.05) continue;
      e.classList.add(`is-${names[k]}`);
      e.style.setProperty(`--${names[k]}`, `${Math.round(100 * most)}%`);
    }
  }

  linkLines() {    // the strongest in words; a click goes there
    const one = (name, kind, [units, weights]) => {
      const e = make("div", `ll-linked is-${kind}`);
      e.append(make("span", "ll-note", `${name} `));
      for (const [i, u] of units.slice(0, 8).entries()) {
        const b = button("", `Go to token ${whole.format(u)}, ${this.said(u, 30)}, share ${number(weights[i])}`, () => {
          this.hover = -1;
          this.choose(u);
          this.show(this.context.starts[u]);
          this.view.focus();
        }, "ll-link");
        b.append(make("bdi", "", this.said(u, 24), {dir: "auto"}), ` ${number(Number(weights[i].toPrecision(2)))}`);
        e.append(b);
      }
      if (!units.length) e.append(make("span", "ll-note", "no token"));
      return e;
    };
    const {to, from, note} = this.links, head = note ? ` (${seen(note)})` : "";
    return [one(`looks at${head}`, "to", to), one("is looked at by", "from", from)];
  }

  // -- keyboard

  key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const page = Math.max(1, Math.floor(this.view.clientHeight / this.height) - 1);
    const move = {
      ArrowLeft: () => this.cursor - 1, ArrowRight: () => this.cursor + 1, Home: () => 0, End: () => this.n - 1,
      ArrowUp: () => this.beside(-1), ArrowDown: () => this.beside(1), PageUp: () => this.beside(-page), PageDown: () => this.beside(page),
    }[e.key];
    if (move && this.n) this.go(move(), e.shiftKey);
    else if ((e.key === "Enter" || e.key === " ") && this.cursor >= 0) this.choose(this.cursor, e.shiftKey);
    else if (e.key === "/") { this.search.focus(); this.search.select(); } else if (e.key === "n" && this.matches.length) this.step(1);
    else if (e.key === "N" && this.matches.length) this.step(-1); else return;
    e.preventDefault();
  }

  go(u, extend) {    // the cursor moves, and the selection follows when it rests
    const to = Math.max(0, Math.min(this.n - 1, u));
    if (this.cursor < 0 && u < 0) return this.go(this.first(), extend);
    [this.cursor, this.hover] = [to, -1];
    this.show(this.context.starts[to]);
    this.redraw();
    this.tellDetails(true);
    clearTimeout(this.resting);
    this.resting = setTimeout(() => !this.gone && this.choose(this.cursor, extend), 160);
  }

  first() { return Math.max(0, Math.min(this.n - 1, last(this.context.starts, this.lines?.starts[this.top] ?? 0))); }

  across(line, stop) {    // width of a line up to a character, or the character at a width
    let x = 0;
    const {text} = this.context;
    for (let i = this.lines.starts[line]; i < this.lines.end(line); i = charEnd(text, i)) {
      if (stop(i, x)) return [i, x];
      x += this.lines.ruler.at(text, i);
    }
    return [this.lines.end(line) - 1, x];
  }

  beside(by) {    // the unit above or below the cursor
    if (this.cursor < 0 || !this.lines) return this.first();
    const start = this.context.starts[this.cursor], line = this.lines.of(start);
    this.lines.toLine(line + by + 1);
    const to = Math.max(0, Math.min(this.lines.count - 1, line + by));
    if (to === line) return by < 0 ? 0 : this.n - 1;
    const [, x] = this.across(line, (i) => i >= start);
    const [char] = this.across(to, (i, at) => at + this.lines.ruler.at(this.context.text, i) / 2 >= x);
    const u = Math.max(0, last(this.context.starts, char));
    return by > 0 ? Math.max(u, this.cursor + 1) : Math.min(u, this.cursor - 1);
  }

  // -- search

  find() {
    const sought = this.sought = this.search.value;
    [this.matches, this.match] = [[], -1];
    if (sought) {
      const pattern = new RegExp(sought.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu");
      for (const m of this.context.text.matchAll(pattern)) {
        this.length = m[0].length;
        if (this.matches.push(m.index) === MOST) break;
      }
    }
    this.sayFound();
    this.redraw();
  }

  sayFound() {
    const many = this.matches.length, all = whole.format(many) + (many === MOST ? "+" : "");
    this.found.textContent = !this.search.value ? "" : !many ? "not found" : this.match < 0 ? `${all} found` : `${whole.format(this.match + 1)} of ${all}`;
  }

  step(by) {
    if (!this.matches.length) return;
    const many = this.matches.length;
    this.match = this.match < 0 ? this.nearest(by) : (this.match + by + many) % many;
    const at = this.matches[this.match], u = last(this.context.starts, at);
    if (u >= 0 && at < this.context.ends[u]) [this.cursor, this.hover] = [u, -1];
    this.show(at);
    this.sayFound();
    this.redraw();
    this.tellDetails(true);
  }

  nearest(by) {    // the first match from what is shown now
    const from = this.lines?.starts[this.top] ?? 0, before = last(this.matches, from - 1);
    return by > 0 ? (before + 1) % this.matches.length : Math.max(0, before);
  }

  // -- places

  resize() {
    const width = this.view.clientWidth;
    if (!width || this.gone) return;
    if (this.lines?.width === width - 28) return this.later();
    const style = getComputedStyle(this.view), anchor = this.lines ? this.lines.starts[this.top] : 0;
    this.height = parseFloat(style.lineHeight);
    this.lay(new Ruler(style), width - 28);
    if (!this.fitted && this.lines.done && this.pixels + 12 < this.settings.height) {    // a short text has no empty half below it
      this.view.style.height = `${Math.max(76, this.pixels + 12)}px`;
    }
    this.fitted = true;
    if (this.wanted !== undefined) this.show(this.wanted);
    else if (anchor) this.scrollTo(this.lines.of(anchor));
    this.draw();    // now, so that the first thing that is painted has text
  }

  lay(ruler, width) {
    this.lines = new Lines(this.context, this.folds, ruler, width);
    this.foldFrom = this.folds.map((f) => f.from);
    this.stamp++;
    const more = (lines) => {
      if (lines !== this.lines || this.gone) return;
      lines.slice();
      this.later();
      if (!lines.done) setTimeout(more, 0, lines);
    };
    this.lines.toLine(Math.ceil(this.view.clientHeight / this.height) + 2 * SPARE);
    setTimeout(more, 30, this.lines);
  }

  get pixels() { return this.lines.total * this.height; }
  get ratio() {    // pixels of text for a pixel of the scroll bar
    const room = Math.min(this.pixels, TALL) - this.view.clientHeight;
    return room > 0 ? (this.pixels - this.view.clientHeight) / room : 1;
  }

  scrollTo(line) {
    this.tall.style.height = `${Math.min(this.pixels, TALL)}px`;
    this.view.scrollTop = line * this.height / this.ratio;
  }

  show(char) {    // a character comes into view, if it is not there
    if (!this.lines) { this.wanted = char; return; }
    this.wanted = undefined;
    const line = this.lines.of(char), page = Math.floor(this.view.clientHeight / this.height), top = this.view.scrollTop * this.ratio / this.height;
    if (line < top || line > top + page - 1) this.scrollTo(Math.max(0, line - (line === Math.floor(top) - 1 ? 0 : Math.floor(page / 2))));
    this.later();
  }

  unfold(k) {
    const fold = this.folds[k];
    fold.from = Math.min(fold.to, fold.from + MORE);
    if (fold.from === fold.to) this.folds.splice(k, 1);
    else if (size(this.context.text, fold.from - 1) === 2) fold.from += 1;
    const line = this.top, within = this.view.scrollTop * this.ratio / this.height - line;
    this.lay(this.lines.ruler, this.lines.width);
    this.scrollTo(line + within);
    this.later();
  }

  // -- drawing

  redraw() { this.stamp++; this.later(); }

  later() {
    if (this.waiting || this.gone) return;
    this.waiting = true;
    const draw = () => { this.waiting = false; if (!this.gone && this.lines) this.draw(); };
    if (document.hidden) setTimeout(draw, 0); else requestAnimationFrame(draw);
  }

  draw() {
    const y = this.view.scrollTop * this.ratio, page = Math.ceil(this.view.clientHeight / this.height);
    this.top = Math.max(0, Math.floor(y / this.height));
    this.lines.toLine(this.top + page + SPARE);
    this.top = Math.min(this.top, this.lines.count - 1);
    const from = Math.max(0, Math.min(this.top, this.lines.count - page) - SPARE), to = Math.min(this.lines.count, this.top + page + SPARE);
    if (this.drawnStamp !== this.stamp) this.drawn.clear();
    this.drawnStamp = this.stamp;
    const keep = new Map();
    for (let i = from; i < to; i++) keep.set(i, this.drawn.get(i) ?? this.line(i));
    this.drawn = keep;
    this.tall.style.height = `${Math.min(this.pixels, TALL)}px`;
    this.block.style.transform = `translateY(${this.view.scrollTop - (y - from * this.height)}px)`;
    this.block.replaceChildren(...keep.values());
    if (this.cursor >= 0 && this.block.querySelector(`#${this.id}-${this.cursor}`))
      this.view.setAttribute("aria-activedescendant", `${this.id}-${this.cursor}`);
    else this.view.removeAttribute("aria-activedescendant");
    this.where(this.lines.starts[this.top], this.lines.starts[Math.min(this.lines.count, this.top + page)]);
    this.root.dataset.drawn ??= Math.round(performance.now());    // milliseconds after the page was opened
  }

  rtl(char) {    // does the paragraph of a character run from right to left?
    const {text} = this.context, from = text.lastIndexOf("\n", char - 1) + 1;
    if (this.paragraph?.from !== from) this.paragraph = {from, rtl: rightToLeft(text.slice(from, from + 1000))};
    return this.paragraph.rtl;
  }

  line(i) {
    const from = this.lines.starts[i], to = this.lines.end(i), {starts, ends, heads} = this.context;
    const e = make("div", "ll-line", null, {role: "none", dir: this.rtl(from) ? "rtl" : "ltr"});
    e.parts = [];
    const next = (u) => { let v = u + 1; while (v < this.n && heads[v] === u) v++; return v; };
    let u = this.n ? heads[Math.max(0, last(starts, from))] : 0, v = next(u), at = from;
    if (u < this.n && ends[v - 1] <= from) [u, v] = [v, next(v)];
    while (at < to) {
      const inside = u < this.n && starts[u] <= at, end = Math.min(to, inside ? ends[v - 1] : u < this.n ? starts[u] : to);
      if (inside) { this.units(e, u, v, at, end); if (end === ends[v - 1]) [u, v] = [v, next(v)]; }
      else if (end > at) this.fill(e.appendChild(make("span", "ll-gap")), at, end);
      at = Math.max(at, end);
    }
    e.append(...e.parts);
    return e;
  }

  option(e, u) {
    for (const [k, v] of [["role", "option"], ["id", `${this.id}-${u}`], ["aria-posinset", u + 1], ["aria-setsize", this.n],
      ["aria-selected", this.selected === u]]) e.setAttribute(k, v);
    if (!this.context.text.slice(this.context.starts[u], this.context.ends[u]).trim()) e.setAttribute("aria-label", this.said(u));    // spaces have a name
  }

  units(line, u, v, from, to) {    // one unit, or a character of several as one box with parts
    if (v - u === 1) return line.append(this.unit(u, from, to));
    const rtl = rightToLeft(this.context.text.slice(from, to)), mine = (k) => k >= u && k < v, stops = this.stops(u, v);
    const e = make("span", "ll-u ll-box", null, {"data-u": u, "data-stops": stops.join(" ")});
    if (rtl) e.classList.add("is-rtl");
    this.mark(e, mine(this.cursor) ? this.cursor : mine(this.selected) ? this.selected : u);
    if (this.links) this.linkMark(e, u, v);
    const picked = mine(this.selected) ? this.selected : mine(this.cursor) ? this.cursor : -1, side = `to ${rtl ? "left" : "right"}`;
    const layer = (ink) => `linear-gradient(${side}, ${stops.slice(1).map((p, k) => `${ink(u + k)} ${stops[k]}% ${p}%`).join(", ")})`;
    const edges = stops.slice(1, -1).map((p) => `transparent calc(${p}% - .5px), var(--ll-soft) calc(${p}% - .5px) calc(${p}% + .5px), transparent calc(${p}% + .5px)`);
    e.style.setProperty("--parts", layer((k) => this.ink(k)));
    e.style.setProperty("--edges", picked < 0 ? `linear-gradient(${side}, ${edges.join(", ")})`
      : layer((k) => k === picked ? "var(--ll-accent)" : "transparent"));
    this.fill(e, from, to);
    line.append(e);
    if (from !== this.context.starts[u]) return;
    this.option(e, u);
    for (let k = u + 1; k < v; k++) {    // the others, for those who listen
      const part = make("span", "ll-live", null, {"aria-label": this.said(k)});
      this.option(part, k);
      line.parts.push(part);
    }
  }

  stops(u, v) {    // where the parts of a box end, in per cent: as wide as what they add to the text
    const {starts, ends} = this.context, out = [0];
    for (let k = u, at = starts[u]; k < v; at = Math.max(at, ends[k]), k++) out.push(out[k - u] + Math.max(1, ends[k] - at));
    return out.map((x) => Math.round(1000 * x / out[v - u]) / 10);
  }

  ink(u) {    // the colour of a part
    const q = this.quantity, v = q ? share(q, q.values[u]) : 0;
    if (Number.isNaN(v)) return "color-mix(in srgb, var(--ll-soft) 12%, transparent)";
    return v ? `color-mix(in srgb, var(--ll-${v < 0 ? "cold" : "hot"}) ${Math.round(Math.abs(v) * 100)}%, transparent)` : "transparent";
  }

  mark(e, u) {    // spans, selection and cursor
    const s = this.spanOf ? this.spanOf[u] : -1;
    if (s >= 0) { e.classList.add("in-span"); e.style.setProperty("--span", this.spans[s].colour); }
    if (this.span && u >= this.span.start && u < this.span.end) e.classList.add("in-picked");
    if (u === this.selected) e.classList.add("is-selected");
    if (this.range && u >= this.range[0] && u < this.range[1]) e.classList.add("in-range");
    if (u === this.cursor) e.classList.add("is-cursor");
    if (this.links) this.linkMark(e, u, u + 1);
  }

  unit(u, from, to) {
    const {starts, ends, empty} = this.context, first = from === starts[u], q = this.quantity;
    const e = make("span", "ll-u", null, {"data-u": u});
    if (first) this.option(e, u); else e.setAttribute("role", "none");
    const v = q ? share(q, q.values[u]) : 0;
    if (Number.isNaN(v)) e.classList.add("is-unknown");
    else if (v) {
      e.classList.add(v < 0 ? "is-cold" : "is-hot");
      e.style.setProperty("--v", Math.round(Math.abs(v) * 100));
    }
    this.mark(e, u);
    if (empty.has(u)) e.classList.add("is-empty");
    if (!first) e.classList.add("goes-on");
    if (to < ends[u]) e.classList.add("is-cut");
    this.fill(e, from, to);
    return e;
  }

  fill(e, from, to) {    // text from one character to another, with folds and matches
    const {text} = this.context;
    let at = from, f = Math.max(0, last(this.foldFrom, from));
    while (at < to) {
      while (f < this.folds.length && this.folds[f].to <= at) f++;
      const fold = this.folds[f];
      if (fold && fold.from <= at) {
        e.append(make("button", "ll-fold", foldText(fold), {type: "button", "data-fold": f, tabindex: "-1",
          title: `Show ${whole.format(Math.min(MORE, fold.to - fold.from))} of them`}));
        at = fold.to;
        continue;
      }
      const end = Math.min(to, fold ? fold.from : to);
      this.write(e, text, at, end);
      at = end;
    }
  }

  write(e, text, from, to) {
    let at = from, m = this.matches.length ? Math.max(0, last(this.matches, from - this.length)) : 0;
    for (; m < this.matches.length && this.matches[m] < to; m++) {
      const a = Math.max(at, this.matches[m]), b = Math.min(to, this.matches[m] + this.length);
      if (b <= a) continue;
      if (a > at) this.put(e, text, at, a);
      const mark = e.appendChild(make("mark", m === this.match ? "is-here" : ""));
      this.put(mark, text, a, b);
      at = b;
    }
    if (at < to) this.put(e, text, at, to);
  }

  put(e, text, from, to) {    // signs for what cannot be seen stand out from the text
    const parted = (i) => i > 0 && size(text, i - 1) === 2;    // between the halves of a pair
    const before = parted(from) ? from : Math.max(0, from - 8), some = text.slice(before, parted(to) ? to : to + 8);    // joiners are judged by neighbours
    let at = from;
    if (MARK.test(text.slice(from, to))) e.append("◌");
    HIDDEN.lastIndex = from - before;
    for (let m; (m = HIDDEN.exec(some)) && m.index + before < to;) {
      const place = m.index + before;
      if (m[1] !== undefined || place < at) continue;
      if (place > at) e.append(text.slice(at, place));
      e.append(make("i", "", sign(m[0])));
      at = place + m[0].length;
    }
    HIDDEN.lastIndex = 0;
    if (at < to) e.append(text.slice(at, to));
  }

  drawLegend() {
    const q = this.quantity;
    this.legend.replaceChildren();
    if (!q) return;
    const ends = q.kind === "diverging" ? [-q.high, 0, q.high] : q.kind === "log" ? [q.low, Math.sqrt(q.low * q.high), q.high]
      : [q.low, (q.low + q.high) / 2, q.high];
    const bar = make("span", `ll-scale is-${q.kind}`, null, {"aria-hidden": "true"}), labels = make("span", "ll-ends");
    labels.append(...ends.map((v) => make("span", "", number(v))));
    const scale = make("span", "ll-gradient", null, {role: "img", "aria-label":
      `Colour scale from ${number(ends[0])} to ${number(ends[2])}${q.kind === "log" ? ", logarithmic" : ""}`});
    scale.append(bar, labels);
    this.legend.append(scale);
    let unknown = 0;
    for (const v of q.values) if (!Number.isFinite(v)) unknown++;
    const notes = [q.kind === "log" ? "log scale" : "", q.note ?? "", unknown ? `hatched: no number (${whole.format(unknown)})` : ""].filter(Boolean);
    if (notes.length) this.legend.append(make("span", "ll-note", seen(notes.join("; "))));
  }

  drawSpans() {
    const list = this.spans, jump = (name) => { this.setSpan(name); this.tell({span: name}); };
    this.spanBar.replaceChildren();
    if (!list.length) return;
    this.spanBar.append(make("span", "ll-note", "Go to"));
    const few = list.length > 9 ? [...list].sort((a, b) => (a.end - a.start) - (b.end - b.start)).slice(0, 4).sort((a, b) => a.start - b.start) : list;
    for (const s of few) {
      const b = button("", `Go to ${visible(s.label ?? s.name)}, ${this.word} ${whole.format(s.start)}`, () => jump(s.name), "ll-span");
      b.dataset.span = s.name;
      b.style.setProperty("--span", s.colour);
      b.append(visible(s.label ?? s.name, 40));
      b.setAttribute("aria-pressed", "false");
      this.spanBar.append(b);
    }
    if (few === list) return;
    const all = make("select", "", null, {"aria-label": "Go to a span"});
    all.append(option("", `all ${whole.format(list.length)}`), ...list.map((s) => option(s.name, visible(s.label ?? s.name, 60))));
    all.addEventListener("change", () => all.value && jump(all.value));
    this.spanBar.append(all);
  }

  drawMap() {
    const {text, starts} = this.context, values = new Float32Array(BINS), inks = new Int32Array(BINS).fill(-1);
    const bin = (char) => Math.min(BINS - 1, Math.floor(char / Math.max(1, text.length) * BINS)), q = this.quantity;
    for (let u = 0; u < this.n; u++) {
      const b = bin(starts[u]), v = q ? share(q, q.values[u]) : 0, s = this.spanOf ? this.spanOf[u] : -1;
      if (Math.abs(v) > Math.abs(values[b])) values[b] = v;
      if (s >= 0 && (inks[b] < 0 || this.spans[s].end - this.spans[s].start < this.spans[inks[b]].end - this.spans[inks[b]].start)) inks[b] = s;
    }
    const cells = [...values].map((v, b) => {
      const e = make("div", v ? v < 0 ? "is-cold" : "is-hot" : "");
      if (v) e.style.setProperty("--v", Math.round(Math.abs(v) * 100));
      if (inks[b] >= 0) e.style.setProperty("--span", this.spans[inks[b]].colour);
      return e;
    });
    this.map.replaceChildren(...cells, this.here);
  }

  where(from, to) {
    const length = Math.max(1, this.context.text.length);
    this.here.style.top = `${100 * from / length}%`;
    this.here.style.height = `${Math.max(0.6, 100 * (to - from) / length)}%`;
  }

  // -- words about a unit

  point(u) { if (u !== this.hover) { this.hover = u; this.tellDetails(false); } }

  said(u, limit = 80) {
    const {text, starts, ends, empty} = this.context, long = ends[u] - starts[u];
    if (empty.has(u)) return "(empty)";
    return visible(text.slice(starts[u], Math.min(ends[u], starts[u] + 4 * limit)), limit) + (long > limit ? ` (${whole.format(long)} characters)` : "");
  }

  value(q, u) { return number(q.values[u]) + (q.errors && Number.isFinite(q.errors[u]) ? ` ± ${number(q.errors[u])}` : ""); }

  facts(u) {
    const {ids, places, heads} = this.context, s = this.spanOf ? this.spanOf[u] : -1;
    let end = u + 1;
    while (end < this.n && heads[end] === heads[u]) end++;
    const box = end - heads[u] > 1 ? [["part", `${u - heads[u] + 1} of ${end - heads[u]}`]] : [];
    return [[this.word === "token" ? "position" : this.word, `${this.number(u)} of ${whole.format(this.n)}`], ...box, ...(ids ? [["id", String(ids[u])]] : []),
      ...places.map((p) => [p.name, `${whole.format(p.from[u])} to ${whole.format(p.to[u])}`]),
      ...(s >= 0 ? [["in", visible(this.spans[s].label ?? this.spans[s].name)]] : [])];
  }

  tellDetails(aloud) {
    const u = this.hover >= 0 ? this.hover : this.cursor >= 0 ? this.cursor : this.selected;
    this.details.replaceChildren();
    if (u >= 0 && u < this.n) this.askLinks(u);
    if (!(u >= 0 && u < this.n)) return this.details.append(make("span", "ll-note", `Point at a ${this.word}, or click one, to see its numbers.`));
    const pair = (name, text, mark) => {
      const e = make("span", mark ? "ll-fact is-shown" : "ll-fact");
      e.append(make("span", "ll-note", `${name} `), make("b", "", text));
      return e;
    };
    this.details.append(make("span", "ll-said", this.said(u), {dir: "auto"}), ...this.facts(u).map(([k, v]) => pair(k, v)),
      ...this.quantities.map((q) => pair(seen(q.name), this.value(q, u), q === this.quantity)));
    if (this.range && this.hover < 0) this.details.append(pair("selected", `${whole.format(this.range[1] - this.range[0])} ${this.words}`));
    if (this.links?.unit === u) this.details.append(...this.linkLines());
    if (!aloud) return;
    const q = this.quantity;
    clearTimeout(this.spoken);
    this.spoken = setTimeout(() => { this.live.textContent = `${this.said(u, 40)}, ${this.facts(u).map((f) => f.join(" ")).join(", ")}${
      q ? `, ${seen(q.name)} ${this.value(q, u)}` : ""}`; }, 60);
  }

  // -- the highest, and what was asked

  strongest() {
    const {kind, values} = this.quantity, most = Math.max(1, this.settings.top), best = [];    // [strength, unit], the strongest first
    for (let u = 0; u < this.n; u++) {
      const v = kind === "diverging" && this.word === "token" ? Math.abs(values[u]) : values[u];    // sources are ranked by score
      if (!Number.isFinite(v) || (best.length === most && v <= best[most - 1][0])) continue;
      let k = best.length;
      while (k > 0 && best[k - 1][0] < v) k--;
      best.splice(k, 0, [v, u]);
      best.length = Math.min(best.length, most);
    }
    return best.map(([, u]) => u);
  }

  drawTable() {
    this.table.replaceChildren();
    if (!this.settings.top || !this.quantity || !this.n) return;
    const q = this.quantity, table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    const names = ["", this.word, seen(q.name), "text", ...this.context.places.map((p) => p.name)];
    head.append(...names.map((name) => make("th", name === "text" ? "" : "ll-number", name, {scope: "col"})));
    for (const [k, u] of this.strongest().entries()) {
      const row = body.insertRow(), at = (text, name = "ll-number") => { row.append(make("td", name, text)); };
      row.dataset.jump = u;
      row.append(make("td"));
      row.lastChild.append(button(String(k + 1), `Go to ${this.word} ${this.number(u)}`, () => { this.choose(u); this.show(this.context.starts[u]); this.view.focus(); }));
      at(this.number(u)); at(this.value(q, u)); at(this.context.excerpts?.[u] ?? this.said(u, 140), "ll-excerpt");
      row.lastChild.dir = "auto";
      for (const p of this.context.places) at(`${whole.format(p.from[u])} to ${whole.format(p.to[u])}`);
    }
    body.addEventListener("click", (e) => { if (!e.target.closest("button")) e.target.closest("tr")?.querySelector("button").click(); });
    const all = body.rows.length < this.n ? `The ${body.rows.length} strongest of ${whole.format(this.n)} ${this.words}` : `All ${this.n} ${this.words}, the strongest first`;
    table.prepend(make("caption", "", all + (this.n > 1 && this.word !== "source" ? "; positions count from 0" : "")));
    this.table.append(table);
  }

  drawAsked() {
    const {question, answer} = this.settings;
    this.asked.replaceChildren();
    if (question) this.asked.append(line("Question", [seen(question.slice(0, LONG)) + (question.length > LONG ? "…" : "")]));
    if (answer?.length) this.asked.append(line("Answer", answer.map((part) => this.answerPart(part))));
    function line(name, parts) {
      const e = make("p", ""), words = make("bdi", "", null, {dir: "auto"});
      words.append(...parts);
      e.append(make("span", "ll-note", `${name} `), words);
      return e;
    }
  }

  answerPart({text, quantity, note, span, apart}) {
    const said = seen(text.slice(0, LONG)) + (text.length > LONG ? `… ${whole.format(text.length - LONG)} more characters` : "");
    if (!quantity && span) {    // a word that can be traced
      const b = button("", `Find the sources of ${visible(text, 100)}`, () => this.tell({asked: span}), "ll-pick ll-ask");
      b.append(said);
      return b;
    }
    if (!quantity) { const e = make("span", "ll-part", said); if (note) e.title = note; return e; }
    const b = button("", `Sources of ${visible(text, 100)}`, () => { this.setQuantity(quantity); this.tell({quantity}); }, "ll-pick");
    b.append(said);
    if (note) b.title = note;
    b.setAttribute("aria-pressed", String(this.quantity?.name === quantity));
    if (apart) b.classList.add("ll-apart");
    return b;
  }
}

// ---- where it is drawn

function guarded(place, draw) {
  try { return draw(); } catch (error) {
    place.append(make("p", "ll-tokens-error", `This text could not be drawn: ${error.message}`));
    console.error(error);
  }
}

function render({model, el}) {    // anywidget
  nameHandles(el);    // names.js
  return guarded(el, () => {
    const told = {selected: "selected", selection: "selection", quantity: "quantity", span: "selected_span", asked: "asked", hovered: "hovered"};
    let mine = false;    // is the change told here?
    const view = new TextView(el, readContext(model.get("_context")), model.get("_settings"), (news) => {
      mine = true;
      for (const [key, value] of Object.entries(news)) model.set(told[key], value);
      mine = false;
      model.save_changes();
    });
    const picked = () => mine || view.select(model.get("selected") ?? -1);
    const on = {
      "change:_quantities": () => view.setQuantities(model.get("_quantities").map(readQuantity)),
      "change:quantity": () => view.quantity?.name !== model.get("quantity") && view.setQuantity(model.get("quantity")),
      "change:_spans": () => view.setSpans(model.get("_spans")),
      "change:selected_span": () => view.span?.name !== model.get("selected_span") && view.setSpan(model.get("selected_span")),
      "change:selected": picked,
      "change:_links": () => view.setLinks(model.get("_links")),
      "change:_settings": () => { view.settings.links = model.get("_settings").links; view.linksOf = undefined; },
    };
    view.setQuantities(model.get("_quantities").map(readQuantity), model.get("quantity"));
    view.setSpans(model.get("_spans"));
    if (model.get("selected_span")) view.setSpan(model.get("selected_span"));
    picked();
    view.tellDetails(false);
    for (const [event, act] of Object.entries(on)) model.on(event, act);
    return () => { for (const [event, act] of Object.entries(on)) model.off(event, act); view.destroy(); };
  });
}

export function mountAll(data = "texts") {    // every place of a page, from a script element with JSON
  const texts = JSON.parse(document.getElementById(data).textContent);
  for (const place of document.querySelectorAll(`[data-${data}]`)) guarded(place, () => {
    const {context, settings, quantities, quantity, spans, selected} = texts[Number(place.getAttribute(`data-${data}`))];
    const view = new TextView(place, readContext(context), settings);
    view.setQuantities(quantities.map(readQuantity), quantity);
    view.setSpans(spans);
    view.select(selected ?? -1);
    view.tellDetails(false);
    place.view = view;
  });
}

export default {render};
