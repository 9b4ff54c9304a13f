"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function svg(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

const color = (i) => `var(--c${i % 4})`;
const known = (values) => values.filter((v) => v !== null);
const figure = (v, digits) => (v === null || v === undefined ? "unknown" : v.toFixed(digits));
const signed = (v) => (v < 0 ? "" : "+") + v.toFixed(2);

function least(values) { return values.reduce((a, b) => Math.min(a, b), Infinity); }
function most(values) { return values.reduce((a, b) => Math.max(a, b), -Infinity); }

/* Round numbers from low to high, about as many as are wanted. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const by = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / by - 1e-9); i * by <= high + by * 1e-9; i++) found.push(i * by);
  return { values: found, digits: Math.max(0, -Math.floor(Math.log10(by) + 1e-9)) };
}

/* From a range of values to one of pixels. */
function scale(low, high, from, to) {
  return (v) => from + (v - low) / (high - low || 1) * (to - from);
}

/* A line through the points; of those in one column of pixels, from the lowest to the highest. */
function path(points) {
  let text = "", pen = "M", column = null;
  const flush = () => {
    if (!column) return;
    text += `${pen}${column.x.toFixed(1)} ${column.low.toFixed(1)}`;
    if (column.high > column.low) text += `L${column.x.toFixed(1)} ${column.high.toFixed(1)}`;
    pen = "L";
    column = null;
  };
  for (const [x, y] of points) {
    if (y === null) { flush(); pen = "M"; continue; }
    if (column && x - column.x < 1) {
      column.low = Math.min(column.low, y);
      column.high = Math.max(column.high, y);
    } else { flush(); column = { x, low: y, high: y }; }
  }
  flush();
  return text;
}

/* A picture that is drawn again when its width changes. draw(svg, width) returns what to show of
   the place under the pointer: near(x, y) -> its index; tell(index) -> {x, y, text}; count. */
function chart(id, height, label, draw) {
  const box = document.getElementById(id);
  if (!box) return;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  let width = 0;
  function redraw() {
    if (box.clientWidth === width || !box.clientWidth) return;
    width = box.clientWidth;
    tip.hidden = true;
    box.replaceChildren(tip);
    const root = svg(box, "svg", {
      viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "img", "aria-label": label,
    });
    const { near, tell, count } = draw(root, width);
    const mark = svg(root, "g", { visibility: "hidden" });
    const line = svg(mark, "line", { class: "at", y1: 0, y2: height - 24 });
    const dot = svg(mark, "circle", { r: 5, fill: "none", stroke: "var(--ink)" });
    let at = -1;
    function show(i) {
      at = Math.max(0, Math.min(count - 1, i));
      const { x, y, text } = tell(at);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", y === null ? -99 : y);
      mark.setAttribute("visibility", "visible");
      tip.textContent = text;
      tip.hidden = false;
      const left = x + 14 + tip.offsetWidth > width ? x - 14 - tip.offsetWidth : x + 14;
      tip.style.left = `${Math.max(0, Math.min(left, width - tip.offsetWidth))}px`;
    }
    function hide() { tip.hidden = true; mark.setAttribute("visibility", "hidden"); }
    const follow = (e) => {
      const place = root.getBoundingClientRect();
      show(near(e.clientX - place.left, e.clientY - place.top));
    };
    root.addEventListener("pointermove", follow);
    root.addEventListener("pointerdown", follow);
    root.addEventListener("pointerleave", hide);
    root.addEventListener("blur", hide);
    root.addEventListener("keydown", (e) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (by) { e.preventDefault(); show(at + by); }
    });
  }
  new ResizeObserver(redraw).observe(box);
  redraw();
}

/* Training loss of all stages, one after the other, and the learning rate below. */
chart("loss", 360, "Training loss and learning rate at every step", (root, width) => {
  const left = 52, right = width - 10, top = 12, middle = 246, low = 270, bottom = 336;
  const every = data.stages.flatMap((stage, s) =>
    stage.step.map((step, i) => ({ stage, s, i, step })));
  const losses = known(data.stages.flatMap((stage) => stage.loss));
  let [min, max] = losses.length ? [least(losses), most(losses)] : [0, 1];
  // No small change is to look large: the axis spans a fifth of its highest value at least.
  const more = Math.max(0, Math.abs(max) / 5 - (max - min)) / 2 + (max - min) * 0.04;
  [min, max] = [min - more, max + more];
  const x = scale(1, Math.max(2, every.length), left, right);
  const y = scale(min, max, middle, top);
  const rates = known(data.stages.flatMap((stage) => stage.rate));
  const highest = Math.max(0, most(rates)) || 1;
  const z = scale(0, highest, bottom, low);

  const losses_at = ticks(min, max, 5);
  for (const v of losses_at.values) {
    svg(root, "line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) });
    svg(root, "text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" },
      v.toFixed(losses_at.digits));
  }
  for (const v of [0, highest]) {
    svg(root, "line", { class: "grid", x1: left, x2: right, y1: z(v), y2: z(v) });
    svg(root, "text", { x: left - 8, y: z(v) + 4, "text-anchor": "end" },
      v ? v.toExponential(0) : "0");
  }
  const steps_at = ticks(1, every.length, Math.max(2, Math.floor(width / 80)));
  for (const v of steps_at.values.filter(Number.isInteger)) {
    const anchor = x(v) > right - 20 ? "end" : "middle";
    svg(root, "text", { x: x(v), y: bottom + 18, "text-anchor": anchor }, v);
  }
  svg(root, "text", { x: right, y: low - 6, "text-anchor": "end" }, "learning rate");

  let start = 0;
  data.stages.forEach((stage, s) => {
    const at = (i) => x(start + i + 1);
    const line = (values, of) => path(values.map((v, i) => [at(i), v === null ? null : of(v)]));
    if (start) {
      const between = x(start + 0.5);
      svg(root, "line", { class: "at", x1: between, x2: between, y1: top, y2: bottom });
    }
    if (every.length <= 400) {
      stage.loss.forEach((v, i) => v === null ||
        svg(root, "circle", { class: "dot", cx: at(i), cy: y(v), r: 2.5, fill: color(s) }));
    } else svg(root, "path", { class: "raw", d: line(stage.loss, y), stroke: color(s) });
    svg(root, "path", { class: "smooth", d: line(stage.smooth, y), stroke: color(s) });
    svg(root, "path", { class: "smooth", d: line(stage.rate, z), stroke: color(s) });
    start += stage.loss.length;
  });
  return {
    count: every.length,
    near: (px) => Math.round((px - left) / (right - left) * (every.length - 1)),
    tell: (n) => {
      const { stage, i, step } = every[n], loss = stage.loss[i], rate = stage.rate[i];
      const lines = [
        `${stage.name}, step ${step} of ${stage.steps}`, `loss ${figure(loss, 4)}`,
        `learning rate ${rate === null ? "unknown" : rate.toExponential(2)}`,
        `${figure(stage.speed[i], 0)} tokens/s`,
      ];
      return { x: x(n + 1), y: loss === null ? null : y(loss), text: lines.join("\n") };
    },
  };
});

/* Translation upwards, reasoning to the right; where one was not measured, scale by scale. */
chart("curve", 360, "Translation against reasoning, as changes from the base", (root, width) => {
  const { points, kinds } = data.curve;
  const left = 52, right = width - 24, top = 30, bottom = 306, up = kinds[0], both = kinds.length > 1;
  const across = (p, i) => (both ? p.reasoning : { change: i, low: null, high: null });
  const ends = (m) => [m.change, m.low, m.high].filter((v) => v !== null);
  const range = (values, from, to) => {
    const [min, max] = [Math.min(0, least(values)), Math.max(0, most(values))];
    const more = (max - min || 1) * 0.08;
    return [min - more, max + more, scale(min - more, max + more, from, to)];
  };
  const [x0, x1, x] = range(points.flatMap((p, i) => ends(across(p, i))), left, right);
  const [y0, y1, y] = range(points.flatMap((p) => ends(p[up])), bottom, top);
  const upwards = ticks(y0, y1, 5), along = ticks(x0, x1, Math.max(2, Math.floor(width / 110)));
  for (const v of upwards.values) {
    const kind = Math.abs(v) < 1e-9 ? "base" : "grid";
    svg(root, "line", { class: kind, x1: left, x2: right, y1: y(v), y2: y(v) });
    svg(root, "text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" },
      v.toFixed(upwards.digits));
  }
  if (both) for (const v of along.values) {
    const kind = Math.abs(v) < 1e-9 ? "base" : "grid";
    svg(root, "line", { class: kind, x1: x(v), x2: x(v), y1: top, y2: bottom });
    svg(root, "text", { x: x(v), y: bottom + 18, "text-anchor": "middle" },
      v.toFixed(along.digits));
  }
  const unit = { translation: "translation, chrF++", reasoning: "reasoning, points" };
  svg(root, "text", { x: 2, y: 14 }, `\u2191 ${unit[up]}`);
  svg(root, "text", { x: right, y: bottom + 42, "text-anchor": "end" },
    both ? `${unit.reasoning} \u2192` : "scale of the change");
  const front = points.filter((p) => p.front).sort((a, b) => b[up].change - a[up].change);
  if (both) svg(root, "path", {
    class: "front", d: path(front.map((p) => [x(p.reasoning.change), y(p[up].change)])),
  });
  const places = points.map((p, i) => [x(across(p, i).change), y(p[up].change)]);
  points.forEach((p, i) => {
    const [px, py] = places[i], wide = across(p, i), high = p[up];
    const stroke = { stroke: color(0), "stroke-opacity": 0.5 };
    if (wide.low !== null) {
      svg(root, "line", { ...stroke, x1: x(wide.low), x2: x(wide.high), y1: py, y2: py });
    }
    if (high.low !== null) {
      svg(root, "line", { ...stroke, x1: px, x2: px, y1: y(high.low), y2: y(high.high) });
    }
    svg(root, "circle", { cx: px, cy: py, r: p.chosen ? 7 : 4, fill: color(p.chosen ? 1 : 0) });
    const end = px > width * 0.7;
    svg(root, "text", {
      class: "name", x: px + (end ? -9 : 9), y: py - 8, "text-anchor": end ? "end" : "start",
    }, p.label);
  });
  const told = (m) =>
    signed(m.change) + (m.low === null ? "" : ` (${signed(m.low)} to ${signed(m.high)})`);
  return {
    count: points.length,
    near: (px, py) => {
      const far = places.map(([a, b]) => (a - px) ** 2 + (b - py) ** 2);
      return far.indexOf(least(far));
    },
    tell: (n) => {
      const lines = kinds.map((kind) => `${kind} ${told(points[n][kind])}`);
      const mark = points[n].chosen ? ", chosen" : "";
      return { x: places[n][0], y: places[n][1], text: [`at ${points[n].label}${mark}`, ...lines].join("\n") };
    },
  };
});

/* Tables sort by a click on a heading, and the other way round by the next one. */
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = (row) => {
        const { value } = row.cells[column].dataset;
        return column === 0 ? row.cells[0].textContent : value === undefined ? null : Number(value);
      };
      const order = (a, b) => (column === 0 ? a.localeCompare(b) : a - b) * (rising ? 1 : -1);
      const rows = [...body.rows].map((row) => [key(row), row]);
      // what was not measured stays below
      rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : order(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
