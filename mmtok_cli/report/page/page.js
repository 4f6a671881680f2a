"use strict";

// Tables: a click on a heading sorts by it, another one turns the order round; what was not measured stays last.
function compareCells(a, b, text) {
  if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
  return text ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b);
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const turn = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value;
      const missing = (row) => value(row) === undefined;
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        missing(a) || missing(b)
          ? compareCells(value(a), value(b), false)
          : turn * compareCells(value(a), value(b), column === 0),
      );
      table.tBodies[0].append(...rows);
    });
  });
}

// Plots: a method of the legend is brought forward while it is pointed at or focused, and for good by a click.
const buttons = [...document.querySelectorAll(".legend button")];
const series = [...document.querySelectorAll(".series")];
let pointed = null;

function bringForward() {
  const pressed = buttons.filter((button) => button.getAttribute("aria-pressed") === "true");
  const chosen = new Set([...pressed, pointed].filter(Boolean).map((button) => button.dataset.series));
  for (const group of series) group.classList.toggle("faded", chosen.size > 0 && !chosen.has(group.dataset.series));
}

for (const button of buttons) {
  const point = () => { pointed = button; bringForward(); };
  const leave = () => { pointed = null; bringForward(); };
  button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && point());
  button.addEventListener("pointerleave", leave);
  button.addEventListener("focus", () => button.matches(":focus-visible") && point());
  button.addEventListener("blur", leave);
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    bringForward();
  });
}
