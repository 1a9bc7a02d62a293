"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  // Okabe and Ito's colours, told apart by colour-blind readers too; the symbol says the same
  const STYLES = { source: ["#888888", "star"], rtn: ["#0072b2", "circle"], gptq: ["#d55e00", "diamond"] };
  const OTHER = ["#009e73", "square"];
  const NAMES = { rtn: "rounding", gptq: "GPTQ" };
  const state = { group: 0, sort: null, down: false, format: "all", algorithm: "all", taken: [] };

  const group = () => DATA.groups[state.group];
  const field = (key) => group().fields.find((f) => f.key === key);
  const figure = (row, key) => row.figures[key];
  const rows = () =>
    group().rows.filter(
      (row) =>
        row.source ||
        ((state.format === "all" || row.formats.includes(state.format)) &&
          (state.algorithm === "all" || row.algorithms.includes(state.algorithm))),
    );
  const kind = (row) => (row.algorithms.includes("gptq") ? "gptq" : row.algorithms.length === 1 ? row.algorithms[0] : "other");
  const text = (cell, f) => (cell === null || cell === undefined ? "–" : cell[0].toFixed(f.digits));
  function spread(cell, f) {
    if (!cell || cell[1] === null) return "";
    const below = cell[0] - cell[1], above = cell[2] - cell[0];
    const even = Math.abs(below - above) <= 1e-9 * (Math.abs(cell[0]) + 1);
    return even ? "± " + above.toFixed(f.digits) : cell[1].toFixed(f.digits) + "–" + cell[2].toFixed(f.digits);
  }
  function element(tag, content, className) {
    const made = document.createElement(tag);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
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
      th.addEventListener("click", () => {
        state.down = state.sort === f.key ? !state.down : false;
        state.sort = f.key;
        drawTable();
      });
      head.append(th);
    }
    $("table").tHead.replaceChildren(head);
    $("table").tBodies[0].replaceChildren(
      ...sorted().map((row) => {
        const tr = element("tr", undefined, (row.source ? "source " : "") + (state.taken.includes(row.name) ? "taken" : ""));
        tr.title = [row.calibration, row.where, row.command].filter(Boolean).join("\n");
        tr.append(element("td", row.name));
        for (const f of group().fields) {
          const td = element("td", text(figure(row, f.key), f));
          const more = spread(figure(row, f.key), f);
          if (more) td.append(element("small", more));
          tr.append(td);
        }
        tr.addEventListener("click", () => take(row.name));
        return tr;
      }),
    );
    $("count").textContent = `${rows().length} of ${group().rows.length} rows`;
  }

  function take(name) {
    state.taken = state.taken.includes(name) ? state.taken.filter((n) => n !== name) : [...state.taken, name].slice(-2);
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

  function layout(extra) {
    const style = getComputedStyle(document.documentElement);
    const [textColor, line] = [style.getPropertyValue("--text").trim(), style.getPropertyValue("--line").trim()];
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: textColor, size: 13 },
      margin: { l: 60, r: 20, t: 20, b: 50 }, hovermode: "closest", legend: { orientation: "h", y: 1.08 }, ...extra,
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

  function drawScatter() {
    const [x, y] = [$("x").value, $("y").value];
    const there = rows().filter((row) => figure(row, x) && figure(row, y));
    const traces = [];
    for (const k of ["source", "rtn", "gptq", ...new Set(there.map(kind))].filter((v, i, all) => all.indexOf(v) === i)) {
      const found = there.filter((row) => kind(row) === k);
      if (!found.length) continue;
      const [color, symbol] = STYLES[k] || OTHER;
      traces.push({
        type: "scatter", mode: "markers+text", name: NAMES[k] || k, text: found.map((row) => row.name), textposition: "top center",
        textfont: { size: 11, color }, x: found.map((row) => figure(row, x)[0]), y: found.map((row) => figure(row, y)[0]),
        error_x: bars(found, x), error_y: bars(found, y), customdata: found.map((row) => row.name), hovertext: found.map(hover),
        hovertemplate: "%{hovertext}<extra></extra>",
        marker: { color, symbol, size: found.map((row) => (state.taken.includes(row.name) ? 17 : 10)), line: { width: 1, color: "#fff" } },
      });
    }
    const best = front(there.map((row) => [figure(row, x)[0], figure(row, y)[0]]), field(x).better, field(y).better);
    if (best.length > 1 && x !== y) {
      traces.unshift({
        type: "scatter", mode: "lines", name: "Pareto front", hoverinfo: "skip", x: best.map((p) => p[0]), y: best.map((p) => p[1]),
        line: { color: "#999999", width: 1.5, dash: "dot" },
      });
    }
    const type = $("log").checked ? "log" : "linear";
    Plotly.react("scatter", traces, layout({ xaxis: { title: { text: field(x).label }, type }, yaxis: { title: { text: field(y).label }, type } }), CONFIG);
  }

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

  function verdict(a, b) {
    const same = a.sums && b.sums && a.sums.tokens.length > 1 && JSON.stringify(a.sums.tokens) === JSON.stringify(b.sums.tokens);
    if (!same) return "These two rows keep no sums by window, so chance cannot be told from a difference.";
    const differences = a.sums.nll.map((v, i) => v - b.sums.nll[i]);
    const total = differences.reduce((s, v) => s + v, 0);
    const p = signFlip(differences);
    const how = `(p = ${p.toPrecision(2)}, paired over ${differences.length} windows)`;
    if (total === 0 || p >= 0.05) return `No difference in perplexity was shown ${how}.`;
    const [better, worse] = total < 0 ? [a, b] : [b, a];
    return `${better.name} is better than ${worse.name} in perplexity ${how}.`;
  }

  function drawCompare() {
    const [a, b] = state.taken.map((name) => group().rows.find((row) => row.name === name));
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
      tr.append(element("td", change === null ? "–" : (change > 0 ? "+" : "") + change.toFixed(f.digits)));
      table.append(tr);
    }
    $("compare").replaceChildren(element("h2", `${a.name} and ${b.name}`), element("p", verdict(a, b)), table);
  }

  function drawLayers() {
    const found = group().rows.filter((row) => row.layers && (!state.taken.length || state.taken.includes(row.name)));
    if (!found.length) return Plotly.purge("layers"), $("layers").replaceChildren();
    const traces = found.map((row) => ({
      type: "scatter", mode: "lines+markers", name: row.name, x: row.layers.map((p) => p[0]), y: row.layers.map((p) => p[1]),
    }));
    Plotly.react("layers", traces, layout({ xaxis: { title: { text: "layer" } }, yaxis: { title: { text: "relative squared error" }, type: "log" } }), CONFIG);
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
    drawAll();
  }
  function drawAll() { drawTable(); drawScatter(); drawCompare(); drawLayers(); }

  function dark(on) { document.documentElement.classList.toggle("dark", on); }
  const wanted = new URLSearchParams(location.search).get("theme");
  dark(wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  options($("group"), DATA.groups.map((g, i) => [i, g.title]), 0);
  $("group").addEventListener("change", () => { state.group = Number($("group").value); state.sort = null; drawGroup(); });
  for (const id of ["x", "y", "log"]) $(id).addEventListener("change", drawScatter);
  for (const name of ["format", "algorithm"]) $(name).addEventListener("change", () => { state[name] = $(name).value; drawTable(); drawScatter(); });
  $("theme").addEventListener("click", () => { dark(!document.documentElement.classList.contains("dark")); drawScatter(); drawLayers(); });
  drawGroup();
  $("scatter").on("plotly_click", (event) => { const name = event.points[0].customdata; if (name) take(name); });
})();
