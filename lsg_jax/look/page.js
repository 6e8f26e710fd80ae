"use strict";
// The view of looks. The page that `lsg explore` serves gives it new answers; a saved page holds its own.

/** The view: several looks whose token, layer, head, map and marks are chosen together. */
class Looks {
  constructor(root, fetchHead = null) {
    this.root = root;
    this.fetchHead = fetchHead;
    this.forms = [...root.querySelectorAll(".choices")];
    this.panes = [];
    this.pointed = Infinity; // the visual token whose numbers are shown, of all looks
    this.state = { token: 0, layer: null, head: ALL, map: "raw", opacity: 100, v: true, l: true, chart: "visual" };
    this.forms.forEach((form) => form.addEventListener("input", () => this.read()));
    this.forms.forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
    document.addEventListener("keydown", (event) => this.key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Shows looks at the same pictures; what was chosen stays, where the new looks have it. */
  async show({ pictures, looks, state = {} }) {
    this.looks = looks.map((data) => (data instanceof Look ? data : new Look(data)));
    const [first] = this.looks, tokens = Math.max(...this.looks.map((look) => look.tokens.length));
    if (pictures !== this.pictures) this.pointed = Infinity;
    this.pictures = pictures;
    Object.assign(this.state, state);
    this.state.layer = limit(this.state.layer ?? first.tellingLayer(), 0, first.layers - 1);
    const firstWithText = Math.max(first.tokens.findIndex((text) => text.trim()), 0);
    this.state.token = "token" in state || this.chosen ? limit(this.state.token, 0, Math.max(tokens - 1, 0)) : firstWithText;
    this.single = first.by_head || this.fetchHead; // heads one by one
    if (!this.single) this.state.head = ALL;
    this.state.head = limit(this.state.head, ALL, first.heads - 1);
    if (!(this.state.map in first.maps)) this.state.map = "raw";
    const template = this.root.querySelector("template"), box = this.root.querySelector(".panes");
    while (this.panes.length < looks.length) this.panes.push(new Pane(template, this));
    this.panes.length = looks.length;
    box.replaceChildren(...this.panes.map((pane) => pane.root));
    box.style.setProperty("--panes", looks.length);
    box.classList.toggle("alone", looks.length === 1);
    this.root.hidden = false;
    this.warn();
    const changed = this.panes.map((pane, index) => [pane, this.looks[index]]).filter(([pane, look]) => pane.look !== look);
    await Promise.all(changed.map(([pane, look]) => pane.show(look, pictures)));
    await this.draw();
  }

  warn() {
    const lines = [...new Set(this.looks.flatMap((look) => look.warnings))];
    if (!this.single) lines.push("This page holds means over heads only: the maps of every head would make it too large.");
    this.root.querySelector(".warnings").replaceChildren(...lines.map((line) => {
      const note = document.createElement("p");
      note.className = "note";
      note.append(...withCode(line));
      return note;
    }));
  }

  /** The fields of the view, by name. */
  get fields() {
    return Object.assign({}, ...this.forms.map(({ elements }) =>
      Object.fromEntries([...elements].filter(({ name }) => name).map(({ name }) => [name, elements[name]]))));
  }

  point(token) {
    if (token === this.pointed) return;
    this.pointed = token;
    this.draw();
  }

  set(changes) {
    if ("token" in changes) this.chosen = true;
    Object.assign(this.state, changes);
    return this.draw();
  }

  read() {
    const { map, layer, head, opacity, v, l, chart } = this.fields;
    this.set({
      map: map.value, layer: Number(layer.value), head: Number(head.value), opacity: Number(opacity.value),
      v: v.checked, l: l.checked, chart: chart.value,
    });
  }

  async draw() {
    if (!this.looks) return;
    const { state, root, looks: [first] } = this, { map, layer, head, opacity, v, l, chart } = this.fields;
    for (const radio of map) radio.closest("label").hidden = !(radio.value in first.maps);
    map.value = state.map;
    root.querySelector(".over-neutral").hidden = state.map !== "relative";
    chart.value = state.chart;
    layer.max = first.layers - 1;
    head.max = first.heads - 1;
    head.disabled = !this.single;
    [layer.value, head.value, opacity.value, v.checked, l.checked] = [state.layer, state.head, state.opacity, state.v, state.l];
    const say = (field, text) => { field.closest("label").querySelector("output").textContent = text; };
    say(layer, `${state.layer} of ${first.layers - 1}`);
    say(head, state.head === ALL ? "all" : `${state.head} of ${first.heads - 1}`);
    say(opacity, `${state.opacity} %`);
    const count = (mask) => mask.reduce((sum, bit) => sum + bit, 0), { v: vSinks, l: lSinks } = first.sinks(state.layer);
    const told = (name, stage, mask) => `${name}: ${first.criteria[stage].unknown ? "not known" : count(mask)}`;
    root.querySelector(".v-count").textContent = told("V-sinks", "vit", vSinks);
    root.querySelector(".l-count").textContent = told("L-sinks here", "llm", lSinks);
    await Promise.all(this.panes.map((pane) => pane.draw()));
  }

  key(event) {
    if (!this.looks || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("textarea, select, input, [contenteditable]")) return;
    const { state, looks: [first] } = this, tokens = Math.max(...this.looks.map((look) => look.tokens.length));
    const move = (name, by, low, high) => () => this.set({ [name]: limit(state[name] + by, low, Math.max(high, low)) });
    const maps = Object.keys(told).filter((name) => name in first.maps);
    const action = {
      ArrowLeft: move("token", -1, 0, tokens - 1), ArrowRight: move("token", 1, 0, tokens - 1),
      ",": move("layer", -1, 0, first.layers - 1), ".": move("layer", 1, 0, first.layers - 1), // up and down scroll the page
      "[": this.single && move("head", -1, ALL, first.heads - 1), "]": this.single && move("head", 1, ALL, first.heads - 1),
      m: () => this.set({ map: maps[(maps.indexOf(state.map) + 1) % maps.length] }),
      v: () => this.set({ v: !state.v }), l: () => this.set({ l: !state.l }),
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }
}

const payload = document.getElementById("payload");
if (payload) new Looks(document.querySelector(".view")).show(JSON.parse(payload.textContent));
