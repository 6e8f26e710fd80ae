"use strict";
// One look on the page: its answer, its pictures under a map, the numbers of a token, and the chart of layers and heads.

const V_COLOUR = "#e66100", L_COLOUR = "#1a85ff"; // as draw_sinks; told apart with any common colour deficiency
const CANVAS_SIDE = 640; // pixels

/** What a value of a map says. */
const told = {
  raw: (value) => `attention ${percent(value)}`,
  no_sinks: (value) => `${percent(value)} of the attention off sinks`,
  relative: (value) => `${number(value)} times the neutral prompt's`,
};

/** What the brightest places of the pictures are. Colours show value per area, so they are told by what an even spread has. */
function brightest(maps, map) {
  const texts = maps.map((drawn) => {
    const mean = drawn.reduce((sum, value) => sum + value, 0) / drawn.length;
    return mean > 0 ? `${number(largest(drawn) / mean)} ×` : "nothing";
  });
  const unit = map === "relative" ? "the map's mean" : "an even spread";
  if (texts.length === 1) return texts[0] === "nothing" ? texts[0] : `brightest place: ${texts[0]} ${unit}`;
  const each = texts.map((text, which) => `${text} in picture ${which + 1}`).join(", ");
  return `each picture has its own scale; brightest place: ${each} (1 × is ${unit})`;
}

/** One look on the page. */
class Pane {
  constructor(template, view) {
    this.view = view;
    this.root = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.root.querySelector(selector);
    this.chart = find(".chart canvas");
    this.readout = find(".readout");
    this.find = find;
    this.chart.addEventListener("click", (event) => this.choose(event));
    this.chart.addEventListener("pointermove", (event) => this.overChart(event));
  }

  async show(look, pictures) {
    this.look = look;
    this.canvases = [];
    this.readout.textContent = "Point at the picture, or tap it, for the numbers of a visual token.";
    this.find("h2").textContent = look.title;
    this.find("h2").hidden = !look.title;
    const answer = this.find(".answer");
    answer.textContent = look.answer || "The answer is empty: the model ended at once.";
    answer.classList.toggle("faint", !look.answer);
    this.find(".tokens").replaceChildren(...look.tokens.map((text, token) => this.tokenButton(text, token)));
    const grey = await Promise.all(pictures.map((picture) => this.canvas(picture)));
    if (this.look === look) this.find(".pictures").replaceChildren(...grey);
  }

  tokenButton(text, token) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text.trim() === "" ? "␣" : text;
    button.title = text.trim() === "" ? `token ${token}: no text of its own` : `token ${token}`;
    button.addEventListener("click", () => this.view.set({ token }));
    return button;
  }

  /** A canvas of a picture, with the picture's pixels kept as they are and in grey. */
  async canvas(picture) {
    const image = new Image();
    image.src = picture.src;
    await image.decode();
    const scale = CANVAS_SIDE / Math.max(picture.width, picture.height), canvas = document.createElement("canvas");
    canvas.width = Math.max(Math.round(picture.width * scale), 1);
    canvas.height = Math.max(Math.round(picture.height * scale), 1);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const which = this.canvases.length;
    this.canvases.push({ canvas, context, original: context.getImageData(0, 0, canvas.width, canvas.height) });
    canvas.style.setProperty("--aspect", canvas.width / canvas.height);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => this.point(event, which));
    canvas.addEventListener("keydown", (event) => this.step(event, which));
    return canvas;
  }

  async draw() {
    const { look, view } = this, { map, layer, head } = view.state;
    if (!look?.tokens.length) return this.drawEmpty();
    const token = Math.min(view.state.token, look.tokens.length - 1);
    this.find(".tokens").childNodes.forEach((button, index) => button.setAttribute("aria-pressed", String(index === token)));
    for (const part of [".scale", ".numbers"]) this.find(part).hidden = false;
    this.drawChart(token);
    let values;
    try {
      values = await look.values(map, token, layer, head, view.fetchHead);
    } catch (error) {
      this.readout.textContent = error.message;
      return;
    }
    if (look !== this.look || ["map", "layer", "head"].some((name) => view.state[name] !== { map, layer, head }[name])) return;
    this.values = values;
    const maps = this.canvases.map(({ canvas }, which) =>
      onPicture(values, look.box, look.image, which, canvas.width, canvas.height));
    this.find(".most").textContent = brightest(maps, map);
    this.canvases.forEach((each, which) => this.paint(each, maps[which], largest(maps[which]), which));
    if (view.pointed < look.count) this.tell(view.pointed);
  }

  drawEmpty() {
    this.values = null;
    this.canvases.forEach(({ context, original }) => context.putImageData(original, 0, 0));
    for (const part of [".scale", ".numbers"]) this.find(part).hidden = true;
  }

  paint({ canvas, context, original }, drawn, peak, which) {
    const { state } = this.view, painted = coloured(original.data, drawn, peak, state.opacity / 100);
    context.putImageData(new ImageData(painted, canvas.width, canvas.height), 0, 0);
    const { v, l } = this.look.sinks(state.layer);
    this.look.image.forEach((image, token) => {
      if (image !== which) return;
      if (state.v && v[token]) this.frame(canvas, context, token, V_COLOUR, 0, []);
      if (state.l && l[token]) this.frame(canvas, context, token, L_COLOUR, 0.2, [2.2, 1.4]);
      if (token === this.view.pointed) this.frame(canvas, context, token, "#fff", 0, []);
    });
    canvas.setAttribute("aria-label", `Picture ${which + 1} with the map; arrow keys go from one visual token to the next`);
  }

  /** A frame inside the box of a token, with a dark rim so that it is seen on any picture. */
  frame(canvas, context, token, colour, inset, dashes) {
    const [x0, y0, x1, y1] = this.look.box.subarray(4 * token, 4 * token + 4);
    const left = limit(x0, 0, 1) * canvas.width, top = limit(y0, 0, 1) * canvas.height;
    const width = limit(x1, 0, 1) * canvas.width - left, height = limit(y1, 0, 1) * canvas.height - top;
    const cell = Math.min(width, height), line = limit(cell / 16, 1.5, 4), margin = line + inset * cell;
    for (const [style, wide] of [["rgba(0, 0, 0, .7)", 1.7], [colour, 1]]) {
      context.strokeStyle = style;
      context.lineWidth = wide * line;
      context.setLineDash(wide > 1 ? [] : dashes.map((dash) => dash * line));
      context.strokeRect(left + margin, top + margin, Math.max(width - 2 * margin, 1), Math.max(height - 2 * margin, 1));
    }
  }

  /** The smallest box under the pointer: the finest tile, where boxes overlap. */
  point(event, which) {
    const { box, image } = this.look, place = event.target.getBoundingClientRect();
    const x = (event.clientX - place.left) / place.width, y = (event.clientY - place.top) / place.height;
    const size = (token) => (box[4 * token + 2] - box[4 * token]) * (box[4 * token + 3] - box[4 * token + 1]);
    const under = [...image.keys()].filter((token) => image[token] === which
      && box[4 * token] <= x && x < box[4 * token + 2] && box[4 * token + 1] <= y && y < box[4 * token + 3]);
    if (under.length) this.view.point(under.reduce((best, token) => (size(token) < size(best) ? token : best)));
  }

  step(event, which) {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    const own = [...this.look.image.keys()].filter((token) => this.look.image[token] === which);
    const at = own.indexOf(this.view.pointed);
    event.preventDefault();
    event.stopPropagation();
    this.view.point(own[at < 0 ? 0 : limit(at + by, 0, own.length - 1)]);
  }

  tell(token) {
    const { look } = this, { map, layer } = this.view.state, { v, l } = look.sinks(layer);
    const kind = v[token] ? "a V-sink" : l[token] ? `an L-sink of layer ${layer}` : "no sink";
    const criterion = (name, stage, value) => {
      const { unknown, tau, name: rule } = look.criteria[stage];
      return unknown || Number.isNaN(value) ? [] : [`${rule} ${number(value)} (${name} from ${number(tau)})`];
    };
    this.readout.textContent = [
      `Visual token ${token}, ${kind}`,
      told[map](this.values[token]),
      ...criterion("V-sink", "vit", look.v_value[token]),
      ...criterion("L-sink", "llm", look.l_value[layer * look.count + token]),
    ].join(" · ");
  }

  get cell() {
    return limit(Math.floor(304 / this.look.heads), 4, 24);
  }

  /** Layers from top to bottom, heads from left to right; the darker, the more attention. */
  drawChart(token) {
    const { look, chart, cell } = this, { layer, head, chart: kind } = this.view.state;
    const ratio = window.devicePixelRatio || 1, [left, top] = Pane.margins;
    const size = [left + cell * look.heads + 2, top + cell * look.layers + 2];
    [chart.width, chart.height] = size.map((side) => side * ratio);
    [chart.style.width, chart.style.height] = size.map((side) => `${side}px`);
    const context = chart.getContext("2d"), style = getComputedStyle(this.root);
    context.scale(ratio, ratio);
    const share = (l, n) => look.share(kind, token, l, n);
    let most = 1e-9;
    for (let l = 0; l < look.layers; l++) for (let n = 0; n < look.heads; n++) most = Math.max(most, share(l, n));
    const gap = cell > 8 ? 1 : 0;
    for (let l = 0; l < look.layers; l++) {
      for (let n = 0; n < look.heads; n++) {
        context.globalAlpha = 0.06 + 0.94 * (share(l, n) / most);
        context.fillStyle = style.getPropertyValue("--accent");
        context.fillRect(left + cell * n, top + cell * l, cell - gap, cell - gap);
      }
    }
    context.globalAlpha = 1;
    context.strokeStyle = context.fillStyle = style.getPropertyValue("--ink");
    context.lineWidth = 2;
    if (head === ALL) context.strokeRect(left - 1, top + cell * layer - 1, cell * look.heads + 1, cell + 1);
    else context.strokeRect(left + cell * head - 1, top + cell * layer - 1, cell + 1, cell + 1);
    context.font = `11px ${style.fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const l of new Set([0, layer, look.layers - 1])) {
      if (l === layer || Math.abs(l - layer) * cell >= 12) context.fillText(l, left - 6, top + cell * (l + 0.5));
    }
    context.fillText("layer", left - 6, 6);
    context.textAlign = "left";
    context.fillText("head", left, 6);
    const of = head === ALL ? Array.from({ length: look.heads }, (_, n) => share(layer, n)) : [share(layer, head)];
    const mean = of.reduce((sum, value) => sum + value, 0) / of.length, what = { visual: "the image", sinks: "sinks" }[kind];
    const where = `layer ${layer}, ${head === ALL ? "mean over heads" : `head ${head}`}`;
    this.find(".chart-text").textContent = `${where}: ${percent(mean)} on ${what} (most: ${percent(most)})`;
    chart.setAttribute("aria-label", `Share of attention on ${what} by layer and head; ${where}: ${percent(mean)}`);
  }

  static margins = [38, 14];

  at(event) {
    const place = this.chart.getBoundingClientRect(), [left, top] = Pane.margins, { look, cell } = this;
    const layer = Math.floor((event.clientY - place.top - top) / cell);
    const head = Math.floor((event.clientX - place.left - left) / cell);
    return { layer: limit(layer, 0, look.layers - 1), head: limit(head, ALL, look.heads - 1) };
  }

  choose(event) {
    const { layer, head } = this.at(event), { state } = this.view;
    this.view.set({ layer, head: state.layer === layer && state.head === head ? ALL : head }); // a second click: all heads
  }

  overChart(event) {
    const { layer, head } = this.at(event), token = Math.min(this.view.state.token, this.look.tokens.length - 1);
    const value = head === ALL ? "" : `: ${percent(this.look.share(this.view.state.chart, token, layer, head))}`;
    this.chart.title = `layer ${layer}${head === ALL ? "" : `, head ${head}`}${value}`;
  }
}
