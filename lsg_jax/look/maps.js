"use strict";
// The numbers of looks, as `look_data` of page_data.py writes them, and how they become maps on pictures.

const INFERNO = (
  "2b0b57 4a0c6b 67166e 84206b a02a63 bd3853 d54a41 e9612b f67e14 fc9f07 fac228 f3e55d fcffa4" // upper 85 %, as draw_map
).split(" ").map((text) => [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16)));
const STRONGEST = 0.9; // share of the map's colour in the brightest place
const ALL = -1; // stands for the mean over heads

const octets = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const floats = (text) => new Float32Array(octets(text).buffer);
const limit = (value, low, high) => Math.min(Math.max(value, low), high);
const percent = (value) => `${value === 0 ? 0 : Number((100 * value).toPrecision(value < 0.1 ? 2 : 3))} %`;
const number = (value) => String(Number(value.toPrecision(3)));

/** Nodes of a text, with what stands in backticks as code. */
const withCode = (text) => text.split("`").map((part, index) =>
  index % 2 ? Object.assign(document.createElement("code"), { textContent: part }) : part);

function largest(values) {
  let most = 0;
  for (const value of values) if (value > most) most = value;
  return most;
}

/** The part of [0, 1], cut into cells, that an interval touches: the first cell, and how much of each is covered. */
function cover(start, stop, cells) {
  const first = Math.max(Math.floor(start * cells), 0), last = Math.min(Math.ceil(stop * cells), cells);
  const covered = [];
  for (let cell = first; cell < last; cell++) {
    covered.push(limit(Math.min(cell + 1, stop * cells) - Math.max(cell, start * cells), 0, 1));
  }
  return [first, covered];
}

/** `Look.on_picture`: values [V] on one image, spread evenly over boxes, which add up. Float32Array [height * width]. */
function onPicture(values, box, image, which, width, height) {
  const drawn = new Float32Array(width * height);
  for (let token = 0; token < values.length; token++) {
    const [x0, y0, x1, y1] = box.subarray(4 * token, 4 * token + 4);
    const area = (x1 - x0) * (y1 - y0);
    if (image[token] !== which || !(area > 0) || !values[token]) continue;
    const [top, rows] = cover(y0, y1, height), [left, columns] = cover(x0, x1, width);
    rows.forEach((row, y) => columns.forEach((column, x) => {
      drawn[(top + y) * width + left + x] += (values[token] / area) * row * column;
    }));
  }
  return drawn;
}

/** Red, green, blue and weight of 256 shares of the brightest value: as `draw_map`. */
const COLOURS = new Float32Array(4 * 256);
for (let step = 0; step < 256; step++) {
  const share = step / 255, place = share * (INFERNO.length - 1), low = Math.min(Math.floor(place), INFERNO.length - 2);
  const colour = INFERNO[low].map((value, at) => value + (INFERNO[low + 1][at] - value) * (place - low));
  COLOURS.set([...colour, STRONGEST * share ** 0.7], 4 * step);
}

/** The pixels of a picture under a map, both RGBA bytes; `strength` from 0, the picture alone, to 1. */
function coloured(original, drawn, peak, strength) {
  const painted = new Uint8ClampedArray(original.length);
  for (let place = 0, at = 0; place < drawn.length; place++, at += 4) {
    const step = 4 * (peak > 0 ? Math.round((255 * drawn[place]) / peak) : 0), weight = COLOURS[step + 3];
    const grey = 38 + 0.65 * (0.299 * original[at] + 0.587 * original[at + 1] + 0.114 * original[at + 2]);
    for (let channel = 0; channel < 3; channel++) {
      const own = original[at + channel], map = (1 - weight) * grey + weight * COLOURS[step + channel];
      painted[at + channel] = own + strength * (map - own);
    }
    painted[at + 3] = 255;
  }
  return painted;
}

/** One look with its arrays. */
class Look {
  constructor(data) {
    Object.assign(this, data);
    for (const name of ["box", "v_value", "l_value"]) this[name] = floats(data[name]);
    for (const name of ["v_sink", "l_sink"]) this[name] = octets(data[name]);
    this.shares = { visual: floats(data.shares.visual), sinks: floats(data.shares.sinks) };
    this.count = this.v_sink.length;
    this.kept = new Map(); // maps of single heads that were fetched
  }

  /** Values [V] of a map, or null while they are not here; `fetchHead` brings single heads that the page does not hold. */
  async values(name, token, layer, head, fetchHead) {
    if (head === ALL) return this.row(this.maps[name], token * this.layers + layer);
    if (this.by_head) return this.row(this.by_head[name], (token * this.layers + layer) * this.heads + head);
    const key = `${token} ${layer} ${head}`;
    if (!this.kept.has(key)) this.kept.set(key, await fetchHead(this, token, layer, head));
    return this.row(this.kept.get(key)[name], 0);
  }

  row(map, index) {
    map.decoded ??= { largest: floats(map.largest), steps: octets(map.steps) };
    const { largest, steps } = map.decoded;
    const own = steps.subarray(index * this.count, (index + 1) * this.count);
    return Float32Array.from(own, (step) => (step / 255) * largest[index]);
  }

  sinks(layer) {
    return { v: [...this.v_sink], l: [...this.l_sink.subarray(layer * this.count, (layer + 1) * this.count)] };
  }

  /** The layer in which sinks draw most attention; without sinks that in which the image does. */
  tellingLayer() {
    const of = (kind) => Array.from({ length: this.layers }, (_, layer) => {
      let sum = 0;
      this.tokens.forEach((_, token) => { for (let head = 0; head < this.heads; head++) sum += this.share(kind, token, layer, head); });
      return sum;
    });
    const sinks = of("sinks"), sums = sinks.some((sum) => sum > 0) ? sinks : of("visual");
    return sums.indexOf(Math.max(...sums));
  }

  share(kind, token, layer, head) {
    return this.shares[kind][(token * this.layers + layer) * this.heads + head];
  }
}
