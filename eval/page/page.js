"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  // Okabe and Ito's colours, on light and on dark, told apart by colour-blind readers too; the symbol says the same
  const STYLES = {
    source: ["#555555", "#cccccc", "star"], rtn: ["#0072b2", "#56b4e9", "circle"], gptq: ["#d55e00", "#e69f00", "diamond"],
  };
  const OTHER = ["#009e73", "#2cc295", "square"];
  const NAMES = { rtn: "rounding", gptq: "GPTQ" };
  const state = { group: 0, sort: null, down: false, format: "all", algorithm: "all", taken: [] };

  const group = () => DATA.groups[state.group];
  const field = (key) => group().fields.find((f) => f.key === key);
  const figure = (row, key) => row.figures[key];
  const isDark = () => document.documentElement.classList.contains("dark");
  const styleOf = (k) => { const [light, dark, symbol] = STYLES[k] || OTHER; return [isDark() ? dark : light, symbol]; };
  const rows = () =>
    group().rows.filter(
      (row) =>
        row.source ||
        ((state.format === "all" || row.formats.includes(state.format)) &&
          (state.algorithm === "all" || row.algorithms.includes(state.algorithm))),
    );
  const kind = (row) => (row.algorithms.includes("gptq") ? "gptq" : row.algorithms.length === 1 ? row.algorithms[0] : "other");
  const number = (v, digits) => (Number(v.toFixed(digits)) < 0 ? "−" : "") + Math.abs(v).toFixed(digits);
  // of a large figure fewer digits behind the point: six in all tell any two rows apart
  const places = (cell, f) => Math.max(0, Math.min(f.digits, 5 - Math.floor(Math.log10(Math.abs(cell[0]) || 1))));
  const text = (cell, f) => (cell === null || cell === undefined ? "–" : number(cell[0], places(cell, f)));
  const signed = (v, digits) => (v > 0 ? "+" : "") + number(v, digits);
  function spread(cell, f) {
    if (!cell || cell[1] === null) return "";
    const below = cell[0] - cell[1], above = cell[2] - cell[0];
    const even = Math.abs(below - above) <= 1e-9 * (Math.abs(cell[0]) + 1), digits = places(cell, f);
    return even ? "± " + above.toFixed(digits) : number(cell[1], digits) + (cell[1] < 0 ? " to " : "–") + number(cell[2], digits);
  }
  function element(tag, content, className) {
    const made = document.createElement(tag);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
  }
  // what a click does, Enter does
  function act(made, action) {
    made.tabIndex = 0;
    made.addEventListener("click", action);
    made.addEventListener("keydown", (event) => { if (event.key === "Enter") action(); });
  }
  function options(select, entries, chosen) {
    select.replaceChildren(
      ...entries.map(([value, label]) => {
        const option = element("option", label);
        option.value = value;
        option.selected = String(value) === String(chosen);
        return option;
      }),
    );
  }

  function sorted() {
    const found = rows().slice();
    if (state.sort === null) return found;
    const value = (row) => (state.sort === "name" ? row.name : (figure(row, state.sort) || [null])[0]);
    return found.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what was not measured stands last
      const order = x < y ? -1 : x > y ? 1 : 0;
      return state.down ? -order : order;
    });
  }

  function drawTable() {
    const headings = [{ key: "name", label: "configuration" }, ...group().fields];
    const head = element("tr");
    for (const f of headings) {
      const th = element("th", f.label);
      if (state.sort === f.key) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      th.dataset.key = f.key;
      act(th, () => {
        state.down = state.sort === f.key ? !state.down : false;
        state.sort = f.key;
        drawTable();
      });
      head.append(th);
    }
    $("table").tHead.replaceChildren(head);
    $("table").tBodies[0].replaceChildren(
      ...sorted().map((row) => {
        const tr = element("tr", undefined, (row.source ? "source " : "") + (isTaken(row) ? "taken" : ""));
        tr.title = [row.calibration, row.where, row.command].filter(Boolean).join("\n");
        tr.append(element("td", row.name));
        for (const f of group().fields) {
          const td = element("td", text(figure(row, f.key), f));
          const more = spread(figure(row, f.key), f);
          if (more) td.append(element("small", more));
          tr.append(td);
        }
        act(tr, () => take(row));
        return tr;
      }),
    );
    $("count").textContent = `${rows().length} of ${group().rows.length} rows`;
  }

  // by its place in the group: two rows may have one name (other windows of calibration, say)
  const place = (row) => group().rows.indexOf(row);
  const isTaken = (row) => state.taken.includes(place(row));
  function take(row) {
    const at = place(row);
    state.taken = isTaken(row) ? state.taken.filter((n) => n !== at) : [...state.taken, at].slice(-2);
    drawTable();
    drawScatter();
    drawCompare();
    drawLayers();
  }

  function front(points, betterX, betterY) {
    const signX = betterX === "high" ? -1 : 1, signY = betterY === "high" ? -1 : 1;
    const order = points.slice().sort((a, b) => signX * (a[0] - b[0]) || signY * (a[1] - b[1]));
    let best = Infinity;
    return order.filter((p) => signY * p[1] < best && ((best = signY * p[1]), true));
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function layout(extra) {
    const [textColor, dim, line, ground] = ["--text", "--dim", "--line", "--ground"].map(colour);
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: textColor, size: 13 },
      margin: { l: 60, r: 34, t: 10, b: 50 }, hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
      modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: dim, activecolor: textColor },
      hoverlabel: { bgcolor: ground, font: { color: textColor, size: 12 }, align: "left", namelength: -1 }, ...extra,
      xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
    };
  }
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const escape = (s) => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;");
  function hover(row) {
    const lines = group().fields.filter((f) => figure(row, f.key)).map((f) => {
      const more = spread(figure(row, f.key), f);
      return `${escape(f.label)}: ${text(figure(row, f.key), f)}${more ? " (" + more + ")" : ""}`;
    });
    return `<b>${escape(row.name)}</b><br>${lines.join("<br>")}` + (row.calibration ? `<br>${escape(row.calibration)}` : "");
  }

  function bars(found, key) {
    const cells = found.map((row) => figure(row, key));
    if (!cells.some((c) => c[1] !== null)) return undefined;
    return {
      type: "data", symmetric: false, thickness: 1.2, width: 3,
      array: cells.map((c) => (c[2] === null ? 0 : c[2] - c[0])), arrayminus: cells.map((c) => (c[1] === null ? 0 : c[0] - c[1])),
    };
  }

  // round numbers for logarithmic axes, where plotly would write single digits; over many powers of ten fewer between
  const TICKS = [1, 1.5, 2, 3, 5, 7].flatMap((digit) => [...Array(17).keys()].map((power) => Number(`${digit}e${power - 8}`)));
  const ticks = (low, high) => (high > 300 * low ? TICKS.filter((v) => /^[125]/.test(v.toExponential()) && !/^1\.5/.test(v.toExponential())) : TICKS);
  const tick = (v) => (v >= 1e6 ? v.toExponential().replace("e+", "e") : String(v));
  const values = (key) => rows().filter((row) => figure(row, key)).map((row) => figure(row, key)[0]);
  // A perplexity of so many times the least is a model that is lost, and at its height would squeeze all others.
  const LOST = 20;
  function beyond(key) {
    const found = values(key), near = found.filter((v) => v <= LOST * Math.min(...found));
    return ["ppl", "word"].includes(key) && near.length < found.length ? 1.5 * Math.max(...near) : Infinity;
  }
  function axisOf(key, checkbox) {
    const title = { text: field(key).label, standoff: 10 };
    checkbox.disabled = !values(key).every((v) => v > 0);
    const log = !checkbox.disabled && checkbox.checked, edge = beyond(key);
    const low = Math.min(...values(key));
    // no range asked for is plotly's own; a double click shows everything
    const ends = log ? [Math.log10(low / 1.3), Math.log10(edge)] : [low - 0.05 * (edge - low), edge];
    const range = edge === Infinity ? {} : { range: ends, autorange: false };
    if (!log) return { title, type: "linear", ...range };
    return { title, type: "log", tickmode: "array", tickvals: TICKS, ticktext: TICKS.map(tick), ...range };
  }
  function sayBeyond(x, y) {
    const out = rows().filter((row) => [x, y].some((key) => figure(row, key) && figure(row, key)[0] > beyond(key)));
    $("beyond").hidden = !out.length;
    $("beyond").textContent = `Beyond the edge: ${out.map((row) => row.name).join(", ")}. A double click shows all.`;
  }
  // as the pictures of the report choose it
  function chooseLog(key, checkbox, ratio) {
    const found = values(key);
    checkbox.checked = Math.min(...found) > 0 && Math.max(...found) > ratio * Math.min(...found);
  }

  function drawScatter() {
    const [x, y] = [$("x").value, $("y").value];
    const there = rows().filter((row) => figure(row, x) && figure(row, y));
    const traces = [];
    for (const k of ["source", "rtn", "gptq", ...new Set(there.map(kind))].filter((v, i, all) => all.indexOf(v) === i)) {
      const found = there.filter((row) => kind(row) === k);
      if (!found.length) continue;
      const [color, symbol] = styleOf(k);
      traces.push({
        type: "scatter", mode: "markers", name: escape(NAMES[k] || k),
        x: found.map((row) => figure(row, x)[0]), y: found.map((row) => figure(row, y)[0]),
        error_x: bars(found, x), error_y: bars(found, y), customdata: found.map(place), hovertext: found.map(hover),
        hovertemplate: "%{hovertext}<extra></extra>", hoverlabel: { bordercolor: color },
        marker: { color, symbol, opacity: 1, size: found.map((row) => (isTaken(row) ? 17 : 10)), line: { width: 1, color: colour("--ground") } },
      });
    }
    const best = front(there.map((row) => [figure(row, x)[0], figure(row, y)[0]]), field(x).better, field(y).better);
    if (best.length > 1 && x !== y) {
      traces.unshift({
        type: "scatter", mode: "lines", name: "Pareto front", hoverinfo: "skip", x: best.map((p) => p[0]), y: best.map((p) => p[1]),
        line: { color: "#999999", width: 1.5, dash: "dot" },
      });
    }
    const [xaxis, yaxis] = [axisOf(x, $("logx")), axisOf(y, $("logy"))];
    // a zoom stays while the axes do
    const uirevision = [state.group, x, y, xaxis.type, yaxis.type, xaxis.range, yaxis.range].join();
    sayBeyond(x, y);
    Plotly.react("scatter", traces, layout({ xaxis, yaxis, uirevision }), CONFIG).then(() => name(there, x, y, best));
  }

  // Each row's name where it covers no point, bar, line or other name; one that finds no place is left to the hover.
  function name(there, x, y, best) {
    const { xaxis, yaxis } = $("scatter")._fullLayout;
    const [width, height] = [xaxis._length, yaxis._length];
    const at = (a, b) => [xaxis.d2p(a), yaxis.d2p(b)];
    const points = there.map((row) => at(figure(row, x)[0], figure(row, y)[0]));
    const taken = points.map(([px, py]) => [px - 6, py - 6, px + 6, py + 6]);
    const stroke = ([ax, ay], [bx, by]) => {
      const steps = Math.max(1, Math.ceil(Math.hypot(bx - ax, by - ay) / 6));
      for (let i = 0; i <= steps; i++) {
        const [px, py] = [ax + ((bx - ax) * i) / steps, ay + ((by - ay) * i) / steps];
        taken.push([px - 1, py - 1, px + 1, py + 1]);
      }
    };
    const ends = (cell) => [cell[1] ?? cell[0], cell[2] ?? cell[0]];
    for (const row of there) {
      const [u, v] = [figure(row, x), figure(row, y)];
      if (u[1] !== null) stroke(...ends(u).map((e) => at(e, v[0])));
      if (v[1] !== null) stroke(...ends(v).map((e) => at(u[0], e)));
    }
    best.slice(1).forEach((p, i) => stroke(at(...best[i]), at(...p)));
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "11px sans-serif";
    const annotations = [];
    there.forEach((row, i) => {
      const [px, py] = points[i], half = pen.measureText(row.name).width / 2 + 2;
      if (!(px >= 0 && px <= width && py >= 0 && py <= height)) return;
      for (let step = 0; step < 96; step++) {
        const far = [9, 14, 20, 28, 38, 50][step >> 4], angle = (step % 16) * (Math.PI / 8);
        const [dx, dy] = [(far + half) * Math.cos(angle), -(far + 7) * Math.sin(angle)];
        const box = [px + dx - half, py + dy - 7, px + dx + half, py + dy + 7];
        if (box[0] < 0 || box[1] < 0 || box[2] > width || box[3] > height) continue;
        if (taken.some((t) => t[0] < box[2] && t[2] > box[0] && t[1] < box[3] && t[3] > box[1])) continue;
        taken.push(box);
        const place = { x: xaxis.d2l(figure(row, x)[0]), y: yaxis.d2l(figure(row, y)[0]), text: escape(row.name), captureevents: false };
        const font = { size: 11, color: styleOf(kind(row))[0] };
        if (far < 16) annotations.push({ ...place, font, showarrow: false, xanchor: "center", yanchor: "middle", xshift: dx, yshift: -dy });
        else annotations.push({ ...place, font, showarrow: true, arrowhead: 0, arrowwidth: 0.7, arrowcolor: colour("--dim"), standoff: 6, ax: dx, ay: dy });
        return;
      }
    });
    const update = { annotations };
    for (const [key, axis] of [["xaxis", xaxis], ["yaxis", yaxis]]) {
      if (axis.type !== "log") continue;
      const shown = ticks(10 ** axis.range[0], 10 ** axis.range[1]);
      const inside = shown.filter((v) => Math.log10(v) >= axis.range[0] && Math.log10(v) <= axis.range[1]).length;
      Object.assign(update, { [`${key}.tickvals`]: shown, [`${key}.ticktext`]: shown.map(tick) });
      update[`${key}.tickmode`] = inside > 1 ? "array" : "auto";
    }
    named = () => name(there, x, y, best);
    Plotly.relayout("scatter", update);
  }
  let named = null;

  // Two-sided p-value of paired differences, as brise.eval.compare has it: all sign patterns, or many drawn ones.
  function signFlip(differences) {
    const n = differences.length;
    const sum = (list) => list.reduce((a, b) => a + b, 0);
    const seen = Math.abs(sum(differences)) - 1e-12 * sum(differences.map(Math.abs));
    let extreme = 0;
    if (n <= 16) {
      for (let pattern = 0; pattern < 2 ** n; pattern++) {
        let total = 0;
        for (let i = 0; i < n; i++) total += (pattern >> i) & 1 ? -differences[i] : differences[i];
        if (Math.abs(total) >= seen) extreme++;
      }
      return extreme / 2 ** n;
    }
    let seed = 1;
    const draws = 20000;
    for (let d = 0; d < draws; d++) {
      let total = 0;
      for (let i = 0; i < n; i++) {
        seed ^= seed << 13; seed ^= seed >>> 17; seed ^= seed << 5; // xorshift32
        total += seed & 65536 ? -differences[i] : differences[i];
      }
      if (Math.abs(total) >= seen) extreme++;
    }
    return (extreme + 1) / (draws + 1);
  }

  // Sentences on perplexity and, where both have it, KL.
  function verdicts(a, b) {
    const same = a.sums && b.sums && a.sums.tokens.length > 1 && JSON.stringify(a.sums.tokens) === JSON.stringify(b.sums.tokens);
    if (!same) return ["These two rows keep no sums by window, so chance cannot be told from a difference."];
    return [["nll", "perplexity"], ["kl", "KL"]].filter(([key]) => a.sums[key] && b.sums[key]).map(([key, label]) => {
      const differences = a.sums[key].map((v, i) => v - b.sums[key][i]);
      const total = differences.reduce((s, v) => s + v, 0);
      const p = signFlip(differences);
      const how = `(p = ${p.toPrecision(2)}, paired over ${differences.length} windows)`;
      if (total === 0 || p >= 0.05) return `No difference in ${label} was shown ${how}.`;
      const [better, worse] = total < 0 ? [a, b] : [b, a];
      return `${better.name} is better than ${worse.name} in ${label} ${how}.`;
    });
  }

  function drawCompare() {
    const [a, b] = state.taken.map((at) => group().rows[at]);
    if (!a || !b) return $("compare").replaceChildren();
    const table = element("table"), head = element("tr");
    for (const label of ["", a.name, b.name, "difference"]) head.append(element("th", label));
    table.append(head);
    for (const f of group().fields) {
      const [x, y] = [figure(a, f.key), figure(b, f.key)];
      if (!x && !y) continue;
      const tr = element("tr");
      const ahead = !x || !y || !f.better || x[0] === y[0] ? 0 : (x[0] < y[0]) === (f.better === "low") ? 1 : 2;
      tr.append(element("td", f.label), element("td", text(x, f), ahead === 1 ? "better" : ""), element("td", text(y, f), ahead === 2 ? "better" : ""));
      const change = x && y ? x[0] - y[0] : null;
      tr.append(element("td", change === null ? "–" : signed(change, f.digits)));
      table.append(tr);
    }
    const scroll = element("div", undefined, "scroll");
    scroll.append(table);
    $("compare").replaceChildren(element("h2", `${a.name} and ${b.name}`), ...verdicts(a, b).map((said) => element("p", said)), scroll);
  }

  const MOST = 8; // more lines than this cannot be told apart
  function drawLayers() {
    const all = group().rows.filter((row) => row.layers && (!state.taken.length || isTaken(row)));
    $("layers").hidden = $("layers-note").hidden = !all.length;
    if (!all.length) return Plotly.purge("layers");
    const loss = (row) => (figure(row, "kl") || figure(row, "ppl"))[0];
    const drawn = all.length > MOST ? all.slice().sort((a, b) => loss(a) - loss(b)).slice(0, MOST) : all;
    $("layers-note").textContent = "Error by layer, relative and squared: of outputs, or, dashed, of weights." +
      (drawn.length < all.length ? ` The ${MOST} of ${all.length} rows nearest to the source; take one or two rows to see theirs.` : "");
    const traces = drawn.map((row) => ({
      type: "scatter", mode: "lines+markers", name: escape(row.name), x: row.layers.map((p) => p[0]), y: row.layers.map((p) => p[1]),
      line: { width: 1.5, dash: row.outputs ? "solid" : "dash" }, marker: { size: 5 },
    }));
    const yaxis = { title: { text: "relative squared error" }, type: "log", dtick: 1, exponentformat: "power" };
    Plotly.react("layers", traces, layout({ xaxis: { title: { text: "layer" } }, yaxis }), CONFIG);
  }

  function drawGroup() {
    const g = group();
    $("title").textContent = g.title;
    const keys = g.fields.map((f) => [f.key, f.label]);
    const has = (key) => g.fields.some((f) => f.key === key);
    options($("x"), keys, has($("x").value) ? $("x").value : "size");
    options($("y"), keys, has($("y").value) && $("y").value !== "size" ? $("y").value : "ppl");
    const all = (name) => [["all", "all"], ...[...new Set(g.rows.filter((r) => !r.source).flatMap((r) => r[name]))].sort().map((v) => [v, NAMES[v] || v])];
    options($("format"), all("formats"), (state.format = "all"));
    options($("algorithm"), all("algorithms"), (state.algorithm = "all"));
    state.taken = [];
    chooseLog($("x").value, $("logx"), 2.5);
    chooseLog($("y").value, $("logy"), 4);
    drawAll();
  }
  function drawAll() { drawTable(); drawScatter(); drawCompare(); drawLayers(); }

  function dark(on) { document.documentElement.classList.toggle("dark", on); }
  const wanted = new URLSearchParams(location.search).get("theme");
  dark(wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  $("group").parentElement.hidden = DATA.groups.length < 2;
  options($("group"), DATA.groups.map((g, i) => [i, g.title]), 0);
  $("group").addEventListener("change", () => { state.group = Number($("group").value); state.sort = null; drawGroup(); });
  $("x").addEventListener("change", () => { chooseLog($("x").value, $("logx"), 2.5); drawScatter(); });
  $("y").addEventListener("change", () => { chooseLog($("y").value, $("logy"), 4); drawScatter(); });
  for (const id of ["logx", "logy"]) $(id).addEventListener("change", drawScatter);
  for (const name of ["format", "algorithm"]) $(name).addEventListener("change", () => { state[name] = $(name).value; drawTable(); drawScatter(); });
  $("theme").addEventListener("click", () => { dark(!isDark()); drawScatter(); drawLayers(); });
  drawGroup();
  // zoomed or of another size, other names find a place
  $("scatter").on("plotly_relayout", (change) => { if (named && !("annotations" in change)) named(); });
  $("scatter").on("plotly_click", (event) => { const at = event.points[0].customdata; if (at !== undefined) take(group().rows[at]); });
})();
