"use strict";
// The page is complete without this script: it adds the curves and the controls. It loads and sends nothing.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes, parent, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const element = (name, parent, text) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };

  // Tables as files.
  const save = (name, text) => {
    const link = element("a", document.body);
    const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.href = address;
    link.download = name;
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  };
  for (const button of document.querySelectorAll("button[data-table]")) {
    button.title = "Save this table as a file";
    button.addEventListener("click", () => save(`${button.dataset.table}.csv`, data.tables[button.dataset.table]));
  }

  // Runs: a link to a setting opens its runs.
  const openRuns = () => {
    const row = location.hash.startsWith("#setting-") ? byId(location.hash.slice(1)) : null;
    if (row) row.querySelector("details").open = true;
  };
  addEventListener("hashchange", openRuns);
  openRuns();

  // Tables that scroll say so.
  const cues = [...document.querySelectorAll(".scroll")].map((box) => {
    const cue = element("p", null, "");
    cue.className = "cue small soft";
    box.after(cue);
    return [box, cue];
  });
  const showCues = () => {
    for (const [box, cue] of cues) {
      const more = [];
      if (box.scrollWidth > box.clientWidth + 1) more.push("columns: scroll sideways →");
      if (box.scrollHeight > box.clientHeight + 1) more.push("rows: scroll down ↓");
      cue.textContent = more.length ? `More ${more.join("; more ")}` : "";
      cue.hidden = !more.length;
    }
  };
  const sizes = new ResizeObserver(showCues);
  for (const [box] of cues) {
    sizes.observe(box);
    sizes.observe(box.firstElementChild);
  }

  // Robustness.
  const near = byId("near");
  const showNear = () => {
    const at = Number(near.value);
    byId("near-text").textContent = data.near[at];
    near.setAttribute("aria-valuetext", data.near[at]);
    document.querySelector(".near-caption").textContent = `Share of settings within ${data.near[at]} of the best`;
    for (const cell of document.querySelectorAll("#near-table [data-shares]")) {
      const share = 100 * Number(cell.dataset.shares.split(" ")[at]);
      cell.querySelector(".share").textContent = `${Math.round(share)} %`;
      cell.querySelector(".bar span").style.width = `${share.toFixed(1)}%`;
    }
  };
  if (near) {
    near.addEventListener("input", showNear);
    showNear();
  }

  // Heat maps.
  const map = byId("map");
  const showMap = () => {
    for (const box of document.querySelectorAll("[data-map]")) box.hidden = box.dataset.map !== map.value;
  };
  if (map) {
    map.addEventListener("change", showMap);
    showMap();
  }

  // Curves.
  const chart = byId("chart");
  const readout = byId("readout");
  const xAxis = byId("x-axis");
  const yAxis = byId("y-axis");
  const which = byId("which");
  const words = byId("words");
  const low = byId("y-low");
  const high = byId("y-high");
  const hidden = new Set();
  const HINT = "Point at a curve, or focus the chart and use the arrow keys, to read its values. Drag up or down to zoom, double-click for the whole range.";
  let shown = [];
  let place = null; // { curve, point }
  let frame = null; // the drawn range
  let start = null; // the height at which a range began to be drawn with the mouse

  const isShare = (key) => data.shares.includes(key);
  const scaled = (value, size, unit) => {
    const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    const [by, prefix] = steps.find(([step]) => Math.abs(size) >= step) || [1, ""];
    return `${Number((value / by).toPrecision(4))} ${prefix}${unit}`.trim();
  };
  const units = { bytes: "B", simulated_seconds: "s" };
  const format = (key, value, size = value) => {
    if (value === null || value === undefined) return "–";
    if (isShare(key)) return `${(100 * value).toFixed(2)} %`;
    if (key in units) return scaled(value, size, units[key]);
    return String(Number(value.toPrecision(4)));
  };
  const ticks = (low, high, most, least = 0) => {
    const rough = Math.max((high - low) / most, least) || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) found.push(Number((i * step).toPrecision(12)));
    return found;
  };
  const points = (curve) => {
    const xs = curve.values[xAxis.value];
    const ys = curve.values[yAxis.value];
    if (!xs || !ys) return [];
    const found = [];
    for (let i = 0; i < xs.length; i += 1) if (xs[i] !== null && ys[i] !== null) found.push({ x: xs[i], y: ys[i], at: i });
    return found;
  };
  const choose = () => {
    const wanted = words.value.trim().toLowerCase();
    const named = (curve) => !wanted || `${curve.name} ${data.series[curve.series].name}`.toLowerCase().includes(wanted);
    return data.curves.filter((c) => (which.value === "all" || c.best) && !hidden.has(c.series) && named(c));
  };

  // The range of the vertical axis: the numbers in the two fields, in percent for shares; without one, the whole range.
  const scale = () => (isShare(yAxis.value) ? 100 : 1);
  const bounded = (least, most) => {
    const [from, to] = [low, high].map((field) => (field.value === "" ? NaN : Number(field.value) / scale()));
    const range = [Number.isFinite(from) ? from : least, Number.isFinite(to) ? to : most];
    return range[0] < range[1] ? range : [least, most];
  };
  const setRange = (from, to) => {
    low.value = from === null ? "" : Number((scale() * from).toPrecision(4));
    high.value = to === null ? "" : Number((scale() * to).toPrecision(4));
    draw();
  };
  const zoomToEnds = () => {
    const last = shown.flatMap((item) => item.points.slice(-Math.max(Math.ceil(item.points.length / 4), 1)).map((p) => p.y));
    if (!last.length) return;
    const [from, to] = [Math.min(...last), Math.max(...last)];
    const margin = 0.05 * (to - from || Math.abs(to) || 1);
    setRange(from - margin, to + margin);
  };

  // Names and values at the ends of curves, a line's height apart.
  const MOST_ENDS = 12;
  const endLabels = (width) => {
    if (shown.length > MOST_ENDS) return [];
    const labels = shown.map((item) => {
      const value = format(yAxis.value, item.points.at(-1).y);
      const name = data.series[item.curve.series].name || item.curve.name;
      const most = width < 1000 ? 26 : 44;
      const short = name.length > most ? `${name.slice(0, most - 1)}…` : name;
      const text = make("text", { class: "end" }, chart, width < 640 ? value : `${value} ${short}`);
      return { item, text, value };
    });
    for (const label of labels) {
      if (label.text.getComputedTextLength() > 0.3 * width) label.text.textContent = label.value;
      label.width = label.text.getComputedTextLength();
    }
    return labels;
  };
  const placeEnds = (labels, box, inside) => {
    const LINE = 14;
    const placed = labels.filter(({ item }) => inside(item.points.at(-1))).sort((a, b) => a.item.points.at(-1).py - b.item.points.at(-1).py);
    for (const label of labels) if (!placed.includes(label)) label.text.remove();
    let at = -Infinity;
    for (const label of placed) label.y = at = Math.max(label.item.points.at(-1).py, at + LINE, box.top + 4);
    at = box.bottom;
    for (const label of [...placed].reverse()) {
      label.y = Math.min(label.y, at);
      at = label.y - LINE;
    }
    for (const { item, text, y } of placed) {
      const end = item.points.at(-1);
      const color = `stroke: var(--c${data.series[item.curve.series].color})`;
      make("path", { d: `M${end.px + 2} ${end.py}L${box.right + 6} ${y}H${box.right + 12}`, fill: "none", style: color }, chart);
      text.setAttribute("x", box.right + 15);
      text.setAttribute("y", y + 4);
    }
  };

  const draw = () => {
    const width = Math.max(Math.floor(byId("chart-box").clientWidth), 240);
    const height = Math.round(Math.min(Math.max(0.5 * width, 250), 440));
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.setAttribute("height", height);
    chart.replaceChildren();
    shown = choose().map((curve) => ({ curve, points: points(curve) })).filter((item) => item.points.length);
    const all = shown.flatMap((item) => item.points);
    if (!all.length) {
      make("text", { x: 12, y: 30 }, chart, "Nothing to show: choose other curves or another axis.");
      [place, frame] = [null, null];
      tell();
      table();
      return;
    }
    const least = (key) => all.reduce((least_, p) => Math.min(least_, p[key]), Infinity);
    const most = (key) => all.reduce((most_, p) => Math.max(most_, p[key]), -Infinity);
    const labels = endLabels(width);
    const right = labels.reduce((most_, label) => Math.max(most_, label.width + 18), 14);
    const box = { left: 58, right: width - right, top: 10, bottom: height - 40 };
    const span = (low, high) => (high > low ? [low, high] : [low - 0.5, high + 0.5]);
    const [x0, x1] = span(least("x"), most("x"));
    let [y0, y1] = span(least("y"), most("y"));
    const margin = 0.04 * (y1 - y0);
    [y0, y1] = isShare(yAxis.value) ? [Math.max(y0 - margin, 0), Math.min(y1 + margin, 1)] : [y0 - margin, y1 + margin];
    [y0, y1] = bounded(y0, y1);
    const inside = (point) => point.y >= y0 && point.y <= y1;
    const px = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
    const py = (y) => box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top);

    for (const y of ticks(y0, y1, 6)) {
      make("path", { class: "rule", d: `M${box.left} ${py(y)}H${box.right}` }, chart);
      const text = isShare(yAxis.value) ? `${Number((100 * y).toPrecision(6))} %` : String(y);
      make("text", { x: box.left - 6, y: py(y) + 4, "text-anchor": "end" }, chart, text);
    }
    for (const x of ticks(x0, x1, Math.max(Math.floor(width / 110), 3), xAxis.value === "round" ? 1 : 0)) {
      make("path", { class: "rule", d: `M${px(x)} ${box.bottom}v5` }, chart);
      const side = px(x) > box.right - 16 ? "end" : "middle";
      make("text", { x: px(x), y: box.bottom + 18, "text-anchor": side }, chart, format(xAxis.value, x, x1));
    }
    const label = xAxis.selectedOptions[0].textContent;
    make("text", { x: (box.left + box.right) / 2, y: height - 5, "text-anchor": "middle" }, chart, label);
    make("path", { class: "rule", d: `M${box.left} ${box.bottom}H${box.right}` }, chart);

    make("rect", { x: box.left, y: box.top, width: box.right - box.left + 3, height: box.bottom - box.top }, make("clipPath", { id: "inside" }, chart));
    const lines = make("g", { "clip-path": "url(#inside)" }, chart);
    if (yAxis.value === data.main && shown.length <= 8) {
      for (const { curve, points: own } of shown) {
        const up = own.map((p) => `${px(p.x)} ${py(Math.min(curve.values.high[p.at], y1))}`);
        const down = own.map((p) => `${px(p.x)} ${py(Math.max(curve.values.low[p.at], y0))}`).reverse();
        const { color } = data.series[curve.series];
        make("path", { class: "band", d: `M${up.join("L")}L${down.join("L")}Z`, style: `fill: var(--c${color})` }, lines);
      }
    }
    for (const item of shown) {
      const { color, dash } = data.series[item.curve.series];
      for (const point of item.points) [point.px, point.py] = [px(point.x), py(point.y)];
      item.node = make("path", {
        class: item.curve.best || which.value === "best" ? "curve" : "curve more",
        d: `M${item.points.map((p) => `${p.px.toFixed(1)} ${p.py.toFixed(1)}`).join("L")}`,
        style: `stroke: var(--c${color})`,
        "stroke-dasharray": data.dashes[dash],
        "data-setting": item.curve.setting,
      }, lines);
      if (item.points.length === 1) make("circle", { cx: item.points[0].px, cy: item.points[0].py, r: 4, style: `fill: var(--c${color})` }, lines);
    }
    placeEnds(labels, box, inside);
    frame = { top: box.top, bottom: box.bottom, left: box.left, right: box.right, inside, value: (y) => y1 - ((y - box.top) / (box.bottom - box.top)) * (y1 - y0) };
    place = null;
    tell();
    table();
  };

  const tell = () => {
    chart.querySelector(".spot")?.remove();
    chart.classList.toggle("busy", place !== null);
    for (const item of shown) item.node?.classList.toggle("near", place !== null && item === place.item);
    if (place === null) {
      const absent = choose().length - shown.length;
      const x = xAxis.selectedOptions[0].textContent;
      const left = absent ? ` ${absent} curve${absent > 1 ? "s have" : " has"} no values of ${x} and ${absent > 1 ? "are" : "is"} not drawn.` : "";
      readout.textContent = HINT + left;
      return;
    }
    const { item, point } = place;
    const { curve } = item;
    const { color, name } = data.series[curve.series];
    make("circle", { class: "spot", cx: point.px, cy: point.py, r: 5, style: `fill: var(--c${color}); stroke: var(--panel); stroke-width: 2` }, chart);
    const values = curve.values;
    const parts = [`${yAxis.selectedOptions[0].textContent} ${format(yAxis.value, point.y)}`];
    if (yAxis.value === data.main && curve.seeds > 1) {
      parts.push(`${format(yAxis.value, values.low[point.at])} to ${format(yAxis.value, values.high[point.at])} over ${curve.seeds} seeds`);
    }
    parts.push(`round ${values.round[point.at]}`);
    for (const option of xAxis.options) {
      const value = values[option.value]?.[point.at];
      if (option.value !== "round" && value !== null && value !== undefined) parts.push(`${option.textContent} ${format(option.value, value)}`);
    }
    readout.textContent = `${[name, curve.name].filter(Boolean).join(": ")} (setting ${curve.setting}). ${parts.join(", ")}.`;
  };

  const at = (event) => {
    const page = chart.getBoundingClientRect();
    const size = chart.viewBox.baseVal.width / page.width;
    return [(event.clientX - page.left) * size, (event.clientY - page.top) * size];
  };
  const within = (y) => Math.min(Math.max(y, frame.top), frame.bottom);
  const nearest = (event) => {
    if (frame && start !== null) {
      chart.querySelector(".zone")?.remove();
      const ends = [start, within(at(event)[1])].sort((a, b) => a - b);
      make("rect", { class: "zone", x: frame.left, width: frame.right - frame.left, y: ends[0], height: ends[1] - ends[0] }, chart);
    }
    const [x, y] = at(event);
    let best = Infinity;
    place = null;
    for (const item of shown) {
      for (const point of item.points) {
        if (!frame.inside(point)) continue;
        const far = (point.px - x) ** 2 + (point.py - y) ** 2;
        if (far < best) [best, place] = [far, { item, point }];
      }
    }
    tell();
  };
  chart.addEventListener("pointermove", nearest);
  chart.addEventListener("pointerdown", (event) => {
    start = frame && event.pointerType === "mouse" ? within(at(event)[1]) : null;
    nearest(event);
  });
  chart.addEventListener("pointerup", (event) => {
    const ends = start === null ? [] : [start, within(at(event)[1])].sort((a, b) => a - b);
    start = null;
    chart.querySelector(".zone")?.remove();
    if (ends.length && ends[1] - ends[0] > 12) setRange(frame.value(ends[1]), frame.value(ends[0]));
  });
  chart.addEventListener("dblclick", () => setRange(null, null));
  chart.addEventListener("pointerleave", () => {
    [place, start] = [null, null];
    chart.querySelector(".zone")?.remove();
    tell();
  });
  chart.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e9], End: [0, 1e9] };
    if (event.key === "Escape") place = null;
    else if (!(event.key in moves) || !shown.length) return;
    else if (place === null) place = { item: shown[0], point: shown[0].points.at(-1) };
    else {
      const [rows, steps] = moves[event.key];
      const row = (shown.indexOf(place.item) + rows + shown.length) % shown.length;
      const item = shown[row];
      const from = rows ? item.points.findIndex((p) => p.x >= place.point.x) : item.points.indexOf(place.point);
      const to = Math.min(Math.max((from < 0 ? item.points.length - 1 : from) + steps, 0), item.points.length - 1);
      place = { item, point: item.points[to] };
    }
    event.preventDefault();
    tell();
  });

  const rows = () => shown.map((item) => [data.series[item.curve.series].name, item.curve, item.points]);
  const table = () => {
    const box = byId("curve-table");
    if (!byId("curve-table-box").open) return;
    box.replaceChildren();
    const xs = [...new Set(shown.flatMap((item) => item.points.map((p) => p.x)))].sort((a, b) => a - b);
    const count = Math.min(xs.length, 8);
    const some = Array.from({ length: count }, (_, i) => xs[Math.round((i * (xs.length - 1)) / Math.max(count - 1, 1))]);
    element("caption", box, `${yAxis.selectedOptions[0].textContent}, the latest value at each ${xAxis.selectedOptions[0].textContent}`);
    const head = element("tr", element("thead", box));
    for (const title of ["", "setting", ...some.map((x) => format(xAxis.value, x, some.at(-1)))]) element("th", head, title).scope = "col";
    const body = element("tbody", box);
    for (const [name, curve, own] of rows()) {
      const row = element("tr", body);
      element("th", row, name).scope = "row";
      element("td", row, curve.name);
      for (const x of some) element("td", row, format(yAxis.value, own.filter((p) => p.x <= x).at(-1)?.y)).className = "n";
    }
  };
  byId("curve-table-box").addEventListener("toggle", table);
  byId("curve-csv").addEventListener("click", () => {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = [["series", "setting", "hyperparameters", xAxis.selectedOptions[0].dataset.name, yAxis.value].join(",")];
    for (const [name, curve, own] of rows()) {
      for (const p of own) lines.push([quoted(name), curve.setting, quoted(curve.name), p.x, p.y].join(","));
    }
    save("curves_shown.csv", `${lines.join("\n")}\n`);
  });

  const legend = byId("legend");
  const buttons = data.series.map(({ name, color, dash, best }, number) => {
    const button = element("button", legend);
    button.type = "button";
    const sample = make("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, button);
    make("path", { d: "M1 5H25", fill: "none", "stroke-width": 3, "stroke-dasharray": data.dashes[dash], style: `stroke: var(--c${color})` }, sample);
    element("span", button, best ? `${name}: ${best}` : name);
    button.addEventListener("click", () => {
      if (!hidden.delete(number)) hidden.add(number);
      refresh();
    });
    return button;
  });
  const several = (text, change) => {
    const button = element("button", legend, text);
    button.type = "button";
    button.addEventListener("click", () => { change(); refresh(); });
  };
  if (buttons.length > 2) {
    several("all", () => hidden.clear());
    several("none", () => buttons.forEach((_, number) => hidden.add(number)));
  }
  const refresh = () => {
    buttons.forEach((button, number) => button.setAttribute("aria-pressed", String(!hidden.has(number))));
    draw();
  };
  for (const control of [xAxis, which]) control.addEventListener("change", draw);
  yAxis.addEventListener("change", () => setRange(null, null));
  for (const field of [words, low, high]) field.addEventListener("input", draw);
  byId("zoom").addEventListener("click", zoomToEnds);
  byId("whole").addEventListener("click", () => setRange(null, null));
  let last = 0;
  new ResizeObserver(() => {
    const width = byId("chart-box").clientWidth;
    if (width !== last) requestAnimationFrame(draw);
    last = width;
  }).observe(byId("chart-box"));
  addEventListener("beforeprint", () => {
    for (const box of document.querySelectorAll("details.print")) box.open = true;
    draw();
  });
  refresh();
})();
