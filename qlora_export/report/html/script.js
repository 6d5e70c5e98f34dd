"use strict";
(() => {
  // Numbers by their value, texts by their letters; what has no number comes last either way.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : null;
  };
  const textOf = (row, column) => row.cells[column].textContent.trim();
  const compare = (column, numeric, sign) => (one, other) => {
    if (!numeric) return sign * textOf(one, column).localeCompare(textOf(other, column), "en", { numeric: true });
    const [first, second] = [keyOf(one, column), keyOf(other, column)];
    if (first === null || second === null) return (first === null) - (second === null);
    return sign * (first - second);
  };
  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

  const sort = (table, original, head) => {
    const order = NEXT[head.getAttribute("aria-sort") || "none"];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    let rows = original;
    if (order !== "none") {
      head.setAttribute("aria-sort", order);
      const numeric = original.some((row) => "value" in row.cells[head.cellIndex].dataset);
      rows = [...original].sort(compare(head.cellIndex, numeric, order === "ascending" ? 1 : -1));
    }
    table.tBodies[0].append(...rows);
  };

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const original = [...table.tBodies[0].rows];
    if (original.length < 2) continue;
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      const name = document.createElement("span");
      name.append(...head.childNodes);
      button.append(name);
      button.addEventListener("click", () => sort(table, original, head));
      head.append(button);
    }
  }

  // Paper has everything.
  const folds = () => document.querySelectorAll("details:not([open])");
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...folds()];
    for (const fold of opened) fold.open = true;
  });
  addEventListener("afterprint", () => {
    for (const fold of opened) fold.open = false;
    opened = [];
  });
})();
