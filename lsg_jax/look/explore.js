"use strict";
// The page of `lsg explore`: pictures and a question in, looks out; page.js draws them.

const model = JSON.parse(document.getElementById("model").textContent);
const form = document.querySelector(".question");
const part = (selector) => document.querySelector(selector);
const NOTHING = "";
const PAUSE = 200; // ms after the last move of a slider
const asked = { pictures: [], prompt: "", ids: [], looks: [], titles: [] };
const coefficients = Array.from({ length: model.layers }, () => [1, 1]);
const chosen = []; // pictures: {id, src, width, height}

/** JSON of a request of this page, or an error with the server's line. */
async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `lsg explore` still running?");
  }
  if (answer.ok) return answer;
  const line = await answer.text();
  try {
    throw new Error(JSON.parse(line).error);
  } catch (error) {
    throw error instanceof SyntaxError ? new Error(line) : error;
  }
}

const post = (path, value, signal) => call(path, { method: "POST", body: JSON.stringify(value), signal });

const fetchHead = async (look, token, layer, head) =>
  (await call(`/head?${new URLSearchParams({ look: look.id, token, layer, head })}`)).json();

const view = new Looks(part(".view"), fetchHead);

function element(tag, settings = {}, ...children) {
  const made = Object.assign(document.createElement(tag), settings);
  made.append(...children);
  return made;
}

function complain(error) {
  if (error?.name !== "AbortError") part(".error").textContent = error ? error.message : "";
}

// Pictures.

async function addFiles(files) {
  complain(null);
  for (const file of files) {
    try {
      await addPicture(file, file.name || "the image");
    } catch (error) {
      complain(new Error(`${file.name || "The image"}: ${error.message.replace(/^image: /, "")}`));
    }
  }
  part("#file").value = "";
}

async function addPicture(body) {
  if (body.size > model.maxBytes) throw new Error(`more than ${model.maxBytes >> 20} MiB: this is too large`);
  if (chosen.length >= model.maxPictures) throw new Error(`there are ${model.maxPictures} pictures already: remove one first`);
  chosen.push(await (await call("/pictures", { method: "POST", body })).json());
  showChosen();
}

function showChosen() {
  part(".chosen").replaceChildren(...chosen.map((picture, index) => {
    const remove = element("button", { type: "button", textContent: "×", title: "Remove this picture" });
    remove.setAttribute("aria-label", `Remove picture ${index + 1}`);
    remove.addEventListener("click", () => {
      chosen.splice(index, 1);
      showChosen();
    });
    const alt = `Picture ${index + 1}, ${picture.width} x ${picture.height} pixels`;
    const image = element("img", { src: picture.src, alt });
    return element("figure", {}, image, remove);
  }));
}

async function takeExample(number) {
  complain(null);
  try {
    const body = await (await call(`/examples/${number}.png`)).blob();
    chosen.length = 0;
    await addPicture(body);
    form.elements.prompt.value = model.examples[number].prompt;
    await ask();
  } catch (error) {
    complain(error);
  }
}

part(".examples").replaceChildren(...model.examples.map(({ prompt }, number) => {
  const image = element("img", { src: `/examples/${number}.png`, alt: prompt, loading: "lazy" });
  const button = element("button", { type: "button", title: prompt }, image);
  button.addEventListener("click", () => takeExample(number));
  return button;
}));
part("#file").addEventListener("change", (event) => addFiles([...event.target.files]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // a text goes into the question
    event.preventDefault();
    part(".drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) addFiles([...event.dataTransfer.files]);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles([...event.clipboardData.files]);
});

// Questions.

/** The methods that are shown: of the left side, and of the right one if there is any. */
const shown = () => [form.elements.left.value, form.elements.right.value].filter((method) => method !== NOTHING);

const sideOf = (method) => ({ method, ...(method === "coefficients" ? { coefficients } : {}) });

let running = null, clock = null;

/** Asks the question as it stands, of all sides. */
function ask() {
  if (!chosen.length) return complain(new Error("Add an image first."));
  if (!form.elements.prompt.value.trim()) return complain(new Error("Write a question first."));
  Object.assign(asked, { pictures: [...chosen], prompt: form.elements.prompt.value, looks: [], ids: [], titles: [] });
  return askSides(shown().map((_, index) => index));
}

/** Asks the last question again, of some sides. */
async function askSides(indices) {
  running?.abort();
  const own = (running = new AbortController()), methods = shown();
  complain(null);
  const body = {
    pictures: asked.pictures.map(({ id }) => id), prompt: asked.prompt, sides: indices.map((index) => sideOf(methods[index])),
  };
  start = null;
  say("waiting");
  try {
    const answer = await post("/ask", body, own.signal);
    for await (const event of lines(answer.body)) {
      if (event.error) throw new Error(event.error);
      if (event.state) say(event.state);
      if (event.look) take(indices[event.side], event, methods.length);
    }
    say("");
  } catch (error) {
    if (own !== running) return; // a later question is running
    say("");
    complain(error);
  }
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { done, value } = await reader.read();
    const parts = (held + (value ?? "")).split("\n");
    held = parts.pop();
    for (const line of parts) yield JSON.parse(line);
    if (done) return;
  }
}

function take(side, { id, look }, count) {
  const fresh = !asked.looks.length;
  asked.looks[side] = Object.assign(new Look(look), { id });
  asked.ids[side] = id;
  asked.titles[side] = look.title;
  for (const list of [asked.looks, asked.ids, asked.titles]) list.length = Math.min(list.length, count);
  const looks = asked.looks.filter(Boolean);
  part(".empty").hidden = true;
  part(".save").disabled = false;
  const drawn = view.show({ pictures: asked.pictures, looks });
  if (fresh && matchMedia("(max-width: 56rem)").matches) part(".result").scrollIntoView(); // it is below the question there
  return drawn;
}

const STATES = {
  waiting: "Waiting for the question before",
  answering: "Answering",
  compiling: "Compiling a program for questions of this length, once",
};

let start = null; // of the question
function say(state) {
  const status = part(".status");
  start = state ? (start ?? Date.now()) : null;
  clearInterval(clock);
  status.classList.toggle("busy", Boolean(state));
  const write = () => {
    const seconds = Math.round((Date.now() - start) / 1000);
    status.textContent = state ? `${STATES[state]}${seconds > 1 ? `: ${seconds} s` : ""}` : "";
  };
  write();
  if (state) clock = setInterval(write, 1000);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});

// Methods side by side, and coefficients.

const option = ([value, text]) => element("option", { value, textContent: text });
form.elements.left.replaceChildren(...Object.entries(model.methods).map(option));
form.elements.right.replaceChildren(...[[NOTHING, "Nothing"], ...Object.entries(model.methods)].map(option));
form.elements.right.value = "gates" in model.methods ? "gates" : NOTHING;
part(".methods").hidden = Object.keys(model.methods).length < 2;
part(".coefficients").hidden = !("coefficients" in model.methods);

function compare() {
  if (!asked.looks.length) return;
  const methods = shown();
  if (asked.looks.length > methods.length) {
    for (const list of [asked.looks, asked.ids, asked.titles]) list.length = methods.length;
  }
  askSides(methods.map((_, index) => index));
}
for (const name of ["left", "right"]) form.elements[name].addEventListener("change", compare);

let pause = null;
function changed() {
  showCoefficients();
  const sides = () => shown().flatMap((method, index) => (method === "coefficients" ? [index] : []));
  if (!sides().length) form.elements.right.value = "coefficients";
  clearTimeout(pause);
  pause = setTimeout(() => asked.looks.length && askSides(sides()), PAUSE);
}

const sliders = []; // [layer or null for all, group, input, output]
function sliderRow(name, layer) {
  const cells = [0, 1].map((group) => {
    const input = element("input", { type: "range", min: 0, max: 2, step: 0.05, value: 1 }), output = element("output");
    const which = layer === null ? "All layers" : `Layer ${layer}`;
    input.setAttribute("aria-label", `${which}, ${group ? "other visual tokens" : "V-sinks"}`);
    input.addEventListener("input", () => {
      for (const [l, pair] of coefficients.entries()) if (layer === null || l === layer) pair[group] = Number(input.value);
      changed();
    });
    sliders.push([layer, group, input, output]);
    return element("label", {}, input, output);
  });
  return element("div", { className: layer === null ? "all" : "" }, element("span", { textContent: name }), ...cells);
}

function showCoefficients() {
  for (const [layer, group, input, output] of sliders) {
    const values = new Set(coefficients.map((pair) => pair[group])), [only] = values;
    const value = layer === null ? (values.size === 1 ? only : null) : coefficients[layer][group];
    if (value !== null) input.value = value;
    output.textContent = value === null ? "mix" : String(value);
  }
}

const heading = ["", "V-sinks", "the rest"].map((text) => element("span", { textContent: text }));
part(".rows").replaceChildren(
  element("div", { className: "head" }, ...heading), sliderRow("all", null),
  ...coefficients.map((_, layer) => sliderRow(String(layer), layer)),
);
part(".reset").addEventListener("click", () => {
  for (const pair of coefficients) pair.fill(1);
  changed();
});
showCoefficients();

part(".save").addEventListener("click", async () => {
  complain(null);
  try {
    const { token, layer, head, map, opacity, v, l, chart } = view.state;
    const state = { token, layer, head, map, opacity, v, l, chart };
    const saved = { looks: asked.ids.filter(Boolean), titles: asked.titles.filter(Boolean), state };
    const page = await (await post("/save", saved)).blob();
    const link = element("a", { href: URL.createObjectURL(page), download: "look.html" });
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    complain(error);
  }
});
