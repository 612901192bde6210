// The page: a form that is an order, and the events of its drawing. The server checks orders and says what is wrong.
"use strict";

const ALL = "*"; // in the place of a dish: one of each
const MANY = 24; // images from which they are shown smaller

const form = document.getElementById("order");
const field = (name) => form.elements.namedItem(name);
const element = (id) => document.getElementById(id);
const readable = (name) => name.replaceAll("_", " ");

let menu; // what the server can draw
let drawing; // the AbortController of what is being drawn, if anything is
let drawn = ""; // the query of what is shown, as the server writes it

// The form

function build() {
  const { step, weights, size } = menu.model;
  element("model").textContent = `Step ${step.toLocaleString("en")}, weights ${weights}, ${size} × ${size} pixels.`;
  element("count").textContent = menu.dishes.length;
  for (const dish of menu.dishes) {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", name: "dish", value: dish });
    label.append(box, readable(dish));
    element("dishes").append(label);
    field("mix").append(new Option(readable(dish), dish));
  }
  for (const sampler of menu.samplers) field("sampler").append(new Option(sampler, sampler));
  for (const [name, most] of Object.entries(menu.limits)) field(name).max = most;
  if (!menu.guides) {
    field("guidance").disabled = true;
    element("guidance-note").textContent = "This model was trained without guidance.";
  }
  search();
}

function boxes() {
  return [...element("dishes").querySelectorAll("input")];
}

function chosen() {
  return boxes().filter((box) => box.checked).map((box) => box.value);
}

function inGallery() {
  return element("tab-gallery").getAttribute("aria-selected") === "true";
}

function openTab(id) {
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const open = tab.id === id;
    tab.setAttribute("aria-selected", open);
    tab.tabIndex = open ? 0 : -1;
    element(tab.getAttribute("aria-controls")).hidden = !open;
  }
  element("draw").textContent = inGallery() ? `Draw all ${menu.dishes.length}` : "Draw";
}

function search() {
  const wanted = element("search").value.toLowerCase().split(/[\s_]+/).filter(Boolean);
  let matches = 0;
  for (const box of boxes()) {
    const fits = wanted.every((part) => box.value.toLowerCase().includes(part));
    box.parentElement.hidden = !fits;
    matches += fits;
  }
  element("matches").textContent = wanted.length ? `${matches} of ${menu.dishes.length} dishes match` : "";
}

function showChosen() {
  const chips = chosen().map((dish) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: `${readable(dish)} ×` });
    button.setAttribute("aria-label", `Remove ${readable(dish)}`);
    button.addEventListener("click", () => {
      boxes().find((box) => box.value === dish).checked = false;
      showChosen();
      element("search").focus();
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  element("chosen").replaceChildren(...chips);
  element("none-chosen").hidden = chips.length > 0;
}

function showShare() {
  element("shares").hidden = field("mix").value === "";
  element("share-text").textContent = `${field("share").value} %`;
}

function fill(query) {
  const given = new URLSearchParams(query);
  const dishes = given.getAll("dish");
  const all = dishes.length === 1 && dishes[0] === ALL;
  const wanted = dishes.length && !all ? dishes : [menu.usual.dish];
  for (const box of boxes()) box.checked = wanted.includes(box.value);
  for (const name of ["number", "seed", "sampler", "steps", "guidance", "mix", "share"]) {
    field(name).value = given.get(name) ?? { seed: 0, mix: "", share: 50, ...menu.usual }[name];
  }
  if (all) field("number").value = menu.usual.number;
  showChosen();
  showShare();
  openTab(all ? "tab-gallery" : "tab-dishes");
}

function ordered() {
  const query = new URLSearchParams();
  const add = (...names) => names.forEach((name) => query.append(name, field(name).value));
  if (inGallery()) {
    query.append("dish", ALL);
    query.append("number", 1);
  } else {
    for (const dish of chosen().length ? chosen() : [""]) query.append("dish", dish);
    add("number");
  }
  add("seed", "sampler", "steps", "guidance");
  if (!inGallery() && field("mix").value !== "") add("mix", "share");
  return query.toString();
}

// The drawing

function say(status, error = "") {
  element("status").textContent = status;
  element("error").textContent = error.charAt(0).toUpperCase() + error.slice(1);
  element("error").hidden = error === "";
}

function atWork(working) {
  element("stop").hidden = !working;
  element("progress").hidden = !working;
  element("images").setAttribute("aria-busy", working);
  if (working) element("progress").removeAttribute("value");
  else element("steps").textContent = "";
}

async function* eventsOf(response) {
  let text = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    text += part;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const [, name, data] = event.match(/^event: (.*)\ndata: (.*)$/);
      yield [name, JSON.parse(data)];
    }
  }
}

// Draws what a query asks for. `remember` says whether the browser's history gets a new entry.
async function draw(query, remember) {
  drawing?.abort();
  const mine = (drawing = new AbortController());
  const started = performance.now();
  say("Asking");
  atWork(true);
  try {
    const response = await fetch(`draw?${query}`, { signal: mine.signal });
    if (!response.ok) throw new Error(await response.text());
    let finished = false;
    let count = 0;
    for await (const [name, data] of eventsOf(response)) {
      if (name === "order") {
        count = data.captions.length;
        begin(data, remember);
      } else if (name === "place") {
        say(data.ahead === 1 ? "One visitor is before you" : `${data.ahead} visitors are before you`);
      } else if (name === "look") {
        look(data, count);
      } else if (name === "failed") {
        throw new Error(data.message);
      } else {
        finished = name === "done";
      }
    }
    if (!finished) throw new Error("The server has gone. Start it again, then draw again.");
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    say(`Drawn: ${count} ${count === 1 ? "image" : "images"} in ${seconds} seconds`);
    element("share-it").hidden = false;
  } catch (error) {
    if (mine.signal.aborted) say("Stopped");
    else say("", error instanceof TypeError ? "The server does not answer. Is it running?" : error.message);
  } finally {
    if (drawing === mine) {
      drawing = undefined;
      atWork(false);
    }
  }
}

function begin(about, remember) {
  drawn = about.query;
  if (remember) history.pushState(null, "", `?${drawn}`);
  else history.replaceState(null, "", `?${drawn}`);
  say("Drawing");
  element("share-it").hidden = true;
  element("link").value = location.href;
  element("commands").hidden = about.command === null;
  element("no-command").hidden = about.command !== null;
  element("command").value = about.command ?? "";
  const figures = about.captions.map((caption) => {
    const figure = document.createElement("figure");
    const blank = Object.assign(document.createElement("div"), { className: "blank" });
    const text = Object.assign(document.createElement("figcaption"), { textContent: readable(caption) });
    figure.append(blank, text);
    return figure;
  });
  element("images").classList.toggle("many", figures.length > MANY);
  element("images").replaceChildren(...figures);
}

function look({ first, done, steps, images }, count) {
  if (done === 0) {
    say(first === 0 ? "Getting ready: the first drawing with a sampler takes longer" : "Drawing");
    return;
  }
  if (done === 1) say("Drawing");
  const figures = element("images").children;
  images.forEach((image, i) => {
    const figure = figures[first + i];
    const picture = figure.querySelector("img") ?? document.createElement("img");
    picture.src = image;
    picture.alt = `${figure.textContent}, generated${done < steps ? `, after ${done} of ${steps} steps` : ""}`;
    figure.firstElementChild.replaceWith(picture);
  });
  const part = first > 0 || count > 16 ? `image ${first + 1} and on of ${count}, ` : "";
  element("steps").textContent = `${part}step ${done} of ${steps}`;
  element("progress").value = done / steps;
}

// What is done with a drawing

async function copy(id) {
  const text = element(id);
  text.select();
  try {
    await navigator.clipboard.writeText(text.value);
    say(`${id === "link" ? "Link" : "Command"} copied`);
  } catch {
    say("Selected: copy it with Ctrl+C"); // browsers keep pages of other machines from the clipboard
  }
}

async function download(ending) {
  try {
    const response = await fetch(`drawing.${ending}?${drawn}`);
    if (!response.ok) throw new Error(await response.text());
    const name = decodeURIComponent(response.headers.get("Content-Disposition").split("''")[1]);
    const url = URL.createObjectURL(await response.blob());
    Object.assign(document.createElement("a"), { href: url, download: name }).click();
    URL.revokeObjectURL(url);
  } catch (error) {
    say("", error instanceof TypeError ? "The server does not answer. Is it running?" : error.message);
  }
}

// What is pressed

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw(ordered(), true);
  const { top } = element("results").getBoundingClientRect();
  if (top > innerHeight / 2) element("results").scrollIntoView(); // which are below the form on small screens
});
element("stop").addEventListener("click", () => {
  drawing?.abort();
  element("draw").focus({ preventScroll: true }); // since the pressed button goes
});
element("search").addEventListener("input", search);
element("search").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // the first match is chosen, nothing is drawn
  const match = boxes().find((box) => !box.parentElement.hidden);
  if (match === undefined) return;
  match.checked = true;
  element("search").value = "";
  search();
  showChosen();
});
element("dishes").addEventListener("change", showChosen);
field("mix").addEventListener("change", showShare);
field("share").addEventListener("input", showShare);
field("share").addEventListener("change", () => draw(ordered(), false));
element("reseed").addEventListener("click", () => {
  field("seed").value = Math.floor(Math.random() * menu.limits.seed);
  draw(ordered(), true);
});
document.querySelector('[role="tablist"]').addEventListener("click", (event) => {
  if (event.target.role === "tab") openTab(event.target.id);
});
document.querySelector('[role="tablist"]').addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  openTab(inGallery() ? "tab-dishes" : "tab-gallery");
  document.querySelector('[role="tab"][aria-selected="true"]').focus();
});
for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", () => copy(button.dataset.copies));
}
for (const button of document.querySelectorAll("[data-file]")) {
  button.addEventListener("click", () => download(button.dataset.file));
}
window.addEventListener("popstate", () => {
  fill(location.search);
  draw(location.search.slice(1), false);
});

(async () => {
  try {
    menu = await (await fetch("menu")).json();
  } catch {
    say("", "The server does not answer. Is it running?");
    return;
  }
  build();
  fill(location.search);
  draw(location.search.slice(1), false);
})();
