// A click on a heading sorts the first body of its table: numbers by size and before words, a second click the other way, dashes last.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, body = heading.closest("table").tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending", at = heading.cellIndex;
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[at].dataset.sort;
    const order = (a, b) => (isNaN(a) - isNaN(b) || (isNaN(a) ? a.localeCompare(b) : a - b)) * (up ? 1 : -1);
    const compare = (a, b) => (key(a) === "") - (key(b) === "") || order(key(a), key(b));
    body.append(...[...body.rows].sort(compare));
  });
}
