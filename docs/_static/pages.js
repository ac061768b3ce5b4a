/* Tells each cell of a table the name of its column, which a phone shows in front of it. */
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table.docutils:not(.grid)")) {
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
    const cells = [...table.querySelectorAll("tbody td:not(:first-child)")];
    const figures = cells.filter((cell) => /^[\d.\s]*\d/.test(cell.textContent.trim()));
    if (names.length < 3) continue; // it fits
    table.classList.add(figures.length > cells.length / 2 ? "figures" : "words");
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.cells].forEach((cell, number) => (cell.dataset.name = names[number] ?? ""));
    }
  }
});
