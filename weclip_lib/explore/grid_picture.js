// A picture cut into a grid of cells: click one, or move with the arrow keys.

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

function render({ model, el }) {
  const frame = document.createElement("div");
  const image = document.createElement("img");
  const marker = document.createElement("div");
  frame.className = "weclip-grid";
  frame.tabIndex = 0;
  frame.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes the arrow keys
  frame.setAttribute("role", "slider");
  image.draggable = false;
  image.alt = "";
  frame.append(image, marker);
  el.append(frame);
  let url = "";

  const draw = () => {
    URL.revokeObjectURL(url);
    url = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    image.src = url;
    frame.style.width = `${model.get("width")}px`;
    frame.setAttribute("aria-label", model.get("label"));
  };
  const mark = () => {
    const [rows, columns, cell] = ["rows", "columns", "cell"].map((name) => model.get(name));
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    marker.style.width = `${100 / columns}%`;
    marker.style.height = `${100 / rows}%`;
    marker.style.left = `${(100 * column) / columns}%`;
    marker.style.top = `${(100 * row) / rows}%`;
    frame.setAttribute("aria-valuemin", "1");
    frame.setAttribute("aria-valuemax", String(model.get("cells")));
    frame.setAttribute("aria-valuenow", String(cell + 1));
    frame.setAttribute("aria-valuetext", `row ${row + 1}, column ${column + 1}`);
  };
  const go = (row, column) => {
    const cell = row * model.get("columns") + column;
    const outside = row < 0 || column < 0 || row >= model.get("rows");
    if (outside || column >= model.get("columns") || cell >= model.get("cells")) return;
    model.set("cell", cell);
    model.save_changes();
  };
  frame.addEventListener("click", (event) => {
    const box = image.getBoundingClientRect();
    const down = (event.clientY - box.top) / box.height;
    const along = (event.clientX - box.left) / box.width;
    go(Math.floor(down * model.get("rows")), Math.floor(along * model.get("columns")));
    frame.focus();
  });
  frame.addEventListener("keydown", (event) => {
    const move = MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const columns = model.get("columns");
    go(Math.floor(model.get("cell") / columns) + move[0], (model.get("cell") % columns) + move[1]);
  });
  for (const name of ["png", "width", "label"]) model.on(`change:${name}`, draw);
  for (const name of ["rows", "columns", "cell", "cells"]) model.on(`change:${name}`, mark);
  draw();
  mark();
  return () => URL.revokeObjectURL(url);
}

export default { render };
