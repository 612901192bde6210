// The page's controls: scale and curves are attributes of the body, which the style sheet acts on; pictures are exchanged.
"use strict";

function chosen(name) {
  return document.querySelector(`input[name="${name}"]:checked`).value;
}

function showCurves() {
  document.body.dataset.scale = chosen("scale");
  document.body.dataset.curves = chosen("curves");
}

function showSamples(grids) {
  const slider = document.getElementById("steps");
  const step = grids.steps[slider.value];
  const weights = chosen("weights");
  const wanted = document.getElementById("classes").value;
  const stepText = step.toLocaleString("en");
  document.getElementById("step").textContent = stepText;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  for (const section of document.querySelectorAll("section.class")) {
    const name = section.dataset.class;
    section.hidden = wanted !== "" && wanted !== name;
    for (const figure of section.querySelectorAll("figure")) {
      const run = figure.dataset.run;
      const picture = grids.pictures[run]?.[weights]?.[step]?.[name];
      const image = figure.querySelector("img");
      const what = `${name.replaceAll("_", " ")}, ${run}, step ${stepText}, ${weights} weights`;
      image.hidden = picture === undefined;
      figure.querySelector(".missing").hidden = picture !== undefined;
      image.alt = `samples of ${what}`;
      figure.title = picture === undefined ? `no samples of ${what}` : image.alt;
      if (picture !== undefined) image.src = picture;
    }
  }
}

showCurves();
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
for (const input of document.querySelectorAll('input[name="scale"], input[name="curves"]')) input.addEventListener("change", showCurves);

const pictures = document.getElementById("pictures");
if (pictures !== null) {
  const grids = JSON.parse(pictures.textContent);
  const show = () => showSamples(grids);
  document.getElementById("steps").addEventListener("input", show);
  document.getElementById("classes").addEventListener("change", show);
  for (const input of document.querySelectorAll('input[name="weights"]')) input.addEventListener("change", show);
  show();
}
