"use strict";
// The page of `lsg explore`: pictures and a question in, looks out; page.js draws them.

const model = JSON.parse(document.getElementById("model").textContent);
const form = document.querySelector(".question");
const part = (selector) => document.querySelector(selector);
const NOTHING = "";
const PAUSE = 200; // ms after the last move of a slider
let asked = null; // the question whose answers are shown: {pictures, prompt, looks, made}; made: of which side a look is
const gone = []; // names of answers that are no longer shown
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
  if (error?.name !== "AbortError") part(".error").replaceChildren(...withCode(error ? error.message : ""));
}

// Pictures.

async function addFiles(files) {
  const problems = [];
  complain(null);
  for (const file of files) {
    try {
      await addPicture(file);
    } catch (error) {
      problems.push(`${file.name || "The image"}: ${error.message.replace(/^image: /, "")}`);
      complain(new Error(problems.join("\n")));
    }
  }
  part("#file").value = "";
}

async function addPicture(body) {
  if (body.size > model.maxBytes) throw new Error(`more than ${model.maxBytes >> 20} MiB: this is too large`);
  if (chosen.length >= model.maxPictures) throw new Error(`${model.maxPictures} pictures are the most: remove one first`);
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

let running = null, clock = null, again = false; // again: what is shown was chosen anew while a question ran

/** Asks the question as it stands, of all sides. The answers before stay until the first answer is here. */
function ask() {
  const prompt = form.elements.prompt.value, { length } = [...prompt.trim()];
  complain(null);
  if (!chosen.length) return complain(new Error("Add an image first."));
  if (!length) return complain(new Error("Write a question first."));
  if (length > model.maxPrompt) {
    const most = model.maxPrompt.toLocaleString("en");
    return complain(new Error(`The question has ${length.toLocaleString("en")} characters: ${most} is the most.`));
  }
  running?.abort();
  again = false;
  return askSides({ pictures: [...chosen], prompt, looks: [], made: [] }, shown().map((_, index) => index));
}

/** Brings the answers to the methods that are chosen now: asks the question that is shown again, of the sides that differ. */
function refresh() {
  if (running) {
    again = true;
    return;
  }
  again = false;
  if (!asked) return;
  const methods = shown();
  if (asked.looks.length > methods.length) {
    leave(asked.looks.splice(methods.length));
    asked.made.length = methods.length;
    view.show({ pictures: asked.pictures, looks: asked.looks.filter(Boolean) });
  }
  const differing = [...methods.keys()].filter((index) => asked.made[index] !== JSON.stringify(sideOf(methods[index])));
  if (differing.length) askSides(asked, differing);
}

/** Asks a question of some sides, and shows the answers. */
async function askSides(question, indices) {
  const own = (running = new AbortController()), sides = indices.map((index) => sideOf(shown()[index]));
  const made = sides.map((side) => JSON.stringify(side)), named = [...gone];
  const body = {
    pictures: question.pictures.map(({ id }) => id), prompt: question.prompt, sides, gone: named,
    shown: (asked?.looks ?? []).filter(Boolean).map(({ id }) => id),
  };
  start = null;
  say("waiting");
  try {
    const answer = await post("/ask", body, own.signal);
    gone.splice(0, gone.length, ...gone.filter((id) => !named.includes(id)));
    for await (const event of lines(answer.body)) {
      if (own !== running) return;
      if (event.error) throw new Error(event.error);
      if (event.state) say(event.state);
      if (event.look) take(question, indices[event.side], event, made[event.side]);
    }
  } catch (error) {
    if (own !== running) return; // a later question is running
    complain(error);
  }
  running = null;
  say("");
  if (again) refresh();
}

/** The server need not hold these any longer. */
function leave(looks) {
  gone.push(...looks.filter(Boolean).map(({ id }) => id));
}

function take(question, side, { id, look }, made) {
  if (side >= shown().length) return gone.push(id); // the side has been closed meanwhile
  const fresh = question !== asked;
  if (fresh) leave(asked?.looks ?? []);
  else leave([question.looks[side]]);
  asked = question;
  asked.looks[side] = Object.assign(new Look(look), { id });
  asked.made[side] = made;
  part(".empty").hidden = true;
  part(".save").disabled = false;
  part(".asked").hidden = false;
  part(".asked").textContent = asked.prompt;
  const drawn = view.show({ pictures: asked.pictures, looks: asked.looks.filter(Boolean) });
  if (fresh && matchMedia("(max-width: 56rem)").matches) part(".result").scrollIntoView(); // it is below the question there
  return drawn;
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

for (const name of ["left", "right"]) {
  form.elements[name].addEventListener("change", () => {
    complain(null);
    refresh();
  });
}

let pause = null;
function changed() {
  showCoefficients();
  complain(null);
  if (!shown().includes("coefficients")) form.elements.right.value = "coefficients";
  clearTimeout(pause);
  pause = setTimeout(refresh, PAUSE);
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
    const looks = asked.looks.filter(Boolean);
    const saved = { looks: looks.map(({ id }) => id), titles: looks.map(({ title }) => title), state };
    const page = await (await post("/save", saved)).blob();
    const link = element("a", { href: URL.createObjectURL(page), download: "look.html" });
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    complain(error);
  }
});
