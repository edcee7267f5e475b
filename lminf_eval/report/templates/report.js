"use strict";
// The page reads without this: it only sorts, filters, switches the theme and saves figures.

const table = document.getElementById("all");
const body = table.tBodies[0];
const rows = Array.from(body.rows);
const texts = new Map(rows.map((row) => [row, Array.from(row.cells, (cell) => cell.textContent.replace("†", ""))]));

// Sorting: a click, Enter or Space on a heading; again for the other direction. Equal rows keep their order.
function key(row, column) {
  const shown = row.cells[column].dataset.value ?? texts.get(row)[column];
  const number = Number(shown === "nan" ? NaN : shown.replace("inf", "Infinity"));
  return { number: shown === "" ? NaN : number, text: shown };
}
function compare(a, b) {
  const missing = Number.isNaN(a.number) - Number.isNaN(b.number); // what is no number comes after every number
  if (missing || (!Number.isNaN(a.number) && a.number !== b.number)) return missing || a.number - b.number;
  return Number.isNaN(a.number) ? a.text.localeCompare(b.text, undefined, { numeric: true }) : 0;
}
for (const heading of table.tHead.rows[0].cells) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = heading.textContent;
  heading.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keys = new Map(rows.map((row) => [row, key(row, heading.cellIndex)]));
    const sorted = [...rows].sort((a, b) => compare(keys.get(a), keys.get(b)) * (down ? -1 : 1));
    body.append(...sorted);
  });
}

// Filtering: a row is shown where every chosen value is its own.
const filters = document.getElementById("filters");
const selects = Array.from(filters.querySelectorAll("select"));
const shown = document.getElementById("shown");
filters.hidden = false;
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("change", () => {
  let count = 0;
  for (const row of rows) {
    const cells = texts.get(row);
    row.hidden = !selects.every((select) => !select.value || cells[select.dataset.column] === select.value);
    count += !row.hidden;
  }
  shown.textContent = `${count} of ${rows.length}`;
});

// The theme: the system's, until the button is used.
const theme = document.getElementById("theme");
const dark = () =>
  (document.documentElement.dataset.theme ??
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const label = () => (theme.textContent = dark() ? "Light" : "Dark");
theme.hidden = false;
label();
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  label();
});

// Links into closed sections open them, and paper has no closed sections.
const open = () => document.querySelector(`details${location.hash || "#none"}`)?.setAttribute("open", "");
addEventListener("hashchange", open);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
open();

// Figures are saved on white, in the ink of the light theme.
function save(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}
for (const part of document.querySelectorAll(".save")) part.hidden = false;
for (const button of document.querySelectorAll("[data-save]")) {
  button.addEventListener("click", () => {
    const figure = button.closest("figure");
    const drawing = figure.querySelector("svg").cloneNode(true);
    const { width, height } = figure.querySelector("svg").viewBox.baseVal;
    drawing.setAttribute("style", "color: #1b1b1b; background: #fff");
    drawing.setAttribute("width", width);
    drawing.setAttribute("height", height);
    const text = new XMLSerializer().serializeToString(drawing);
    const url = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    if (button.dataset.save === "svg") return save(url, `${figure.id}.svg`);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [width * 3, height * 3];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      save(canvas.toDataURL("image/png"), `${figure.id}.png`);
    };
    image.src = url;
  });
}
