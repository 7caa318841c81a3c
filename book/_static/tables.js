// On a phone, show a table that does not fit as one block for each row: its name, then a line "column: value" for each cell.
document.addEventListener("DOMContentLoaded", () => {
  if (!window.matchMedia("(max-width: 576px)").matches) return;
  for (const table of document.querySelectorAll(".bd-content table")) {
    if (!table.tHead || table.offsetWidth <= table.parentElement.clientWidth) continue;
    const names = [];
    for (const row of table.tHead.rows) {
      let column = 0;
      for (const cell of row.cells) {
        for (let i = 0; i < cell.colSpan; i++, column++) {
          names[column] = [names[column], cell.innerText.trim()].filter(Boolean).join(", ");
        }
      }
    }
    for (const body of table.tBodies) {
      for (const row of body.rows) {
        // Rows below a cell that spans them lack it; what they have ends at the last column.
        let column = names.length - row.cells.length;
        for (const cell of row.cells) cell.dataset.column = names[column++] ?? "";
      }
    }
    table.classList.add("in-blocks");
  }
});
