// Shows widgets from the state that was stored when their notebook ran. There is no kernel here: what a widget does by itself
// (an anywidget, the selections of a chart) works, and controls that would ask Python are shown as they stood, disabled.
"use strict";
(() => {
  const element = (tag, text = "", attributes = {}) => {
    const el = Object.assign(document.createElement(tag), attributes);
    if (text) el.textContent = text;
    return el;
  };

  const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

  // what an anywidget's render() is given: the state, and events when the widget changes it itself
  class Model {
    constructor(state, models) { this.state = state; this.events = new EventTarget(); this.heard = new Map(); this.models = models; }
    get(name) { return this.state[name]; }
    set(name, value) {
      if (typeof name === "object") { Object.entries(name).forEach(([k, v]) => this.set(k, v)); return; }
      this.state[name] = value;
      for (const kind of [`change:${name}`, "change"]) this.events.dispatchEvent(new CustomEvent(kind));
    }
    on(kinds, call) {
      const heard = () => call();
      this.heard.set(call, heard);
      kinds.split(" ").forEach((kind) => this.events.addEventListener(kind, heard));
    }
    off(kinds, call) { (kinds ?? "").split(" ").forEach((kind) => this.events.removeEventListener(kind, this.heard.get(call) ?? null)); }
    save_changes() {}
    send() {}
    get widget_manager() { return {get_model: async (id) => this.models.model(id.replace("IPY_MODEL_", ""))}; }
  }

  class Widgets {
    constructor(stored) { this.stored = stored.models; this.made = new Map(); this.asks = false; }

    state(name) { return this.stored[String(name).replace("IPY_MODEL_", "")]; }

    model(id) {
      if (this.made.has(id)) return this.made.get(id);
      const {state, buffers = []} = this.stored[id];
      for (const {path, data} of buffers) {
        const last = path.at(-1), inside = path.slice(0, -1).reduce((o, key) => (o[key] ??= {}), state);
        inside[last] = bytes(data);
      }
      this.made.set(id, new Model(state, this));
      return this.made.get(id);
    }

    async any(id, el) {
      const model = this.model(id), css = model.get("_css"), code = model.get("_esm");
      if (css) document.head.append(element("style", css));
      if (!code && model.get("spec")) { el.classList.add("live"); await window.longlens.draw(el, model.get("spec")); return; }
      const address = URL.createObjectURL(new Blob([code], {type: "text/javascript"}));
      const loaded = (await import(address)).default;
      const widget = typeof loaded === "function" ? await loaded() : loaded;
      await widget.initialize?.({model});
      await widget.render?.({model, el});
    }

    control(kind, s) {
      this.asks = true;
      const label = element("label", "", {className: "widget-control"});
      if (s.description) label.append(element("span", s.description));
      const name = s.description || s.tooltip || s.placeholder || kind;    // of controls without a label beside them
      const input = (type, more = {}) => element("input", "", {type, disabled: true, ariaLabel: name, ...more});
      const options = (s._options_labels ?? []).map(String);
      if (/Button$/.test(kind)) return element("button", s.description || "·", {disabled: true, title: s.tooltip ?? ""});
      if (/^(Dropdown|Select|SelectMultiple)$/.test(kind)) {
        const select = element("select", "", {disabled: true, ariaLabel: name, size: kind === "Dropdown" ? 1 : Math.min(options.length, s.rows ?? 5)});
        options.forEach((text, i) => select.append(element("option", text, {selected: i === s.index})));
        label.append(select);
      } else if (/^(RadioButtons|ToggleButtons)$/.test(kind)) {
        options.forEach((text, i) => label.append(input("radio", {checked: i === s.index, ariaLabel: text}), element("span", text)));
      } else if (/Slider$/.test(kind)) {
        const choice = kind.startsWith("Selection"), value = choice ? s.index : s.value;
        label.append(input("range", {min: choice ? 0 : s.min, max: choice ? options.length - 1 : s.max, step: s.step ?? 1,
                                     value: Array.isArray(value) ? value[0] : value}),
                     element("output", choice ? options[s.index] : [s.value].flat().join(" to ")));
      } else if (/Progress$/.test(kind)) {
        label.append(element("progress", "", {ariaLabel: name, value: s.value - (s.min ?? 0), max: (s.max ?? 100) - (s.min ?? 0)}));
      } else if (/^(Checkbox|Valid)$/.test(kind)) label.prepend(input("checkbox", {checked: s.value}));
      else if (kind === "Textarea") label.append(element("textarea", s.value, {disabled: true, ariaLabel: name}));
      else label.append(input("text", {value: s.value ?? ""}));
      return label;
    }

    async children(state, el) {
      for (const child of state.children ?? []) el.append(await this.show(child));
      return el;
    }

    async titled(state, open, kind) {    // Tab, Accordion: each child under its title; Stack: the one that is open
      const el = element("div");
      if (kind === "Stack") { if (state.children?.[open]) el.append(await this.show(state.children[open])); return el; }
      for (const [i, child] of (state.children ?? []).entries()) {
        const part = element("details", "", {open: i === open});
        part.append(element("summary", state.titles?.[i] || `${i + 1}`), await this.show(child));
        el.append(part);
      }
      return el;
    }

    async body(kind, id) {
      const {state} = this.stored[id];
      if (kind === "Any") { const el = element("div"); await this.any(id, el); return el; }
      if (/^(VBox|HBox|Box|GridBox)$/.test(kind)) return this.children(state, element("div", "", {className: `widget-${kind.toLowerCase()}`}));
      if (/^(Tab|Accordion|Stack)$/.test(kind)) return this.titled(state, state.selected_index ?? 0, kind);
      if (/^HTML/.test(kind)) return element("div", "", {innerHTML: state.value ?? "", className: "widget-html"});
      if (kind === "Label") return element("span", state.value ?? "");
      if (kind === "Image") return element("img", "", {src: `data:image/${state.format};base64,${this.stored[id].buffers?.[0]?.data ?? ""}`, alt: ""});
      if (kind === "Output") return element("pre", (state.outputs ?? []).map((o) => o.text ?? o.data?.["text/plain"] ?? "").join(""));
      return this.control(kind, state);
    }

    async show(name) {
      const id = String(name).replace("IPY_MODEL_", ""), {kind, state} = this.stored[id];
      const el = await this.body(kind, id);
      el.classList.add(...(state._dom_classes ?? []));
      for (const [key, value] of Object.entries(this.state(state.layout)?.state ?? {})) el.style.setProperty(key.replaceAll("_", "-"), value);
      return el;
    }
  }

  // widgets know JupyterLab's themes: say which one the page is in
  const dark = matchMedia("(prefers-color-scheme: dark)"), body = document.body;
  const theme = () => { body.dataset.jpThemeLight = String(!(body.dataset.theme === "dark" || (body.dataset.theme !== "light" && dark.matches))); };
  dark.addEventListener("change", theme);
  new MutationObserver(theme).observe(body, {attributes: true, attributeFilter: ["data-theme"]});
  theme();

  const all = [...document.querySelectorAll("[data-widget]")].map(async (place) => {
    const stored = window.longlens.stored(place), widgets = new Widgets(stored);
    try {
      place.append(await widgets.show(stored.view));
      if (widgets.asks) place.append(element("p", "As it stood when the notebook ran: its controls work in Jupyter.", {className: "note"}));
      place.dataset.drawn = "widget";
    } catch (error) {
      place.append(element("p", `This widget could not be shown: ${error.message}`));
      console.error(error);
    }
  });
  return Promise.all(all);
})();
