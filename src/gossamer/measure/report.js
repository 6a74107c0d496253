"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const INK = "#1c2127", SOFT = "#59636e", LINE = "#e2e6ea";
  const FONT = '"Inter", -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
  const RAMP = [[0, "#ffffff"], [0.25, "#d3e3f1"], [0.5, "#85b4d8"], [0.75, "#2f78b5"], [1, "#08306b"]];
  const CONFIG = { displaylogo: false, responsive: false, modeBarButtons: [["toImage"]] }, STILL = { displayModeBar: false };

  const trouble = (what) => {
    byId("trouble").hidden = false;
    byId("trouble").textContent = "A plot could not be drawn (" + what + "). The tables hold the same numbers.";
  };
  window.addEventListener("error", (event) => trouble(event.message));

  // Numbers and words

  const significant = (value) => {
    if (value === 0) return "0";
    const size = Math.floor(Math.log10(Math.abs(value)));
    return size < -4 ? value.toExponential(1) : value.toFixed(Math.max(0, 2 - size));
  };
  const bytes = (count) => {
    let power = 0;
    while (power < 4 && Math.abs(count) >= 999.5) { count /= 1024; power += 1; }
    return (power ? significant(count) : count.toFixed(0)) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][power];
  };
  const percent = (share) => (share >= 0.9995 || share === 0 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + " %";
  const show = { bytes, percent, ms: (v) => significant(v) + " ms", log: (v) => (v <= data.klFloor ? "0" : significant(v)), number: significant };
  // Plotly reads markup in its texts
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, most = 30) => (text.length > most ? text.slice(0, most - 1).trimEnd() + "…" : text);
  const pen = document.createElement("canvas").getContext("2d");
  const widthOf = (text, font) => { pen.font = font; return pen.measureText(text).width; };

  const base = (extra) => ({
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", font: { family: FONT, size: 12.5, color: INK }, showlegend: false,
    hoverlabel: { bgcolor: "#fff", bordercolor: "#c8ced5", font: { family: FONT, size: 12.5, color: INK }, align: "left" }, ...extra,
  });
  const axis = (extra) => ({
    gridcolor: "#edf0f2", linecolor: "#c8ced5", showline: true, zeroline: false, fixedrange: true, ticks: "outside", ticklen: 4,
    tickcolor: "#c8ced5", tickfont: { color: SOFT, size: 12 }, ...extra,
  });
  const fill = (select, options) => {
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    select.closest("label").hidden = options.length < 2;
  };
  const empty = (node, text) => {
    if (node.data) Plotly.purge(node);
    const note = document.createElement("p");
    note.className = "empty";
    note.textContent = text;
    node.style.height = "";
    node.replaceChildren(note);
  };
  const draw = (node, traces, layout, config = CONFIG) => {
    const note = node.querySelector(".empty");
    if (note) note.remove();
    node.style.height = layout.height + "px";
    return Plotly.react(node, traces, { ...layout, width: node.clientWidth }, config);
  };

  // Quality against cost

  const usable = (axes) => axes.filter((a) => data.rows.some((row) => row.points[a.key]));
  const capital = (text) => text[0].toUpperCase() + text.slice(1);

  function decades(low, high) {
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += 1) {
      for (const m of Math.log10(high / low) < 2 ? [1, 2, 5] : [1]) {
        const value = m * 10 ** p;
        if (value >= low && value <= high) ticks.push(value);
      }
    }
    return ticks;
  }
  function doublings(low, high) {
    const from = Math.ceil(Math.log2(low)), to = Math.floor(Math.log2(high)), step = Math.max(1, Math.ceil((to - from + 1) / 8)), ticks = [];
    for (let p = from; p <= to; p += step) ticks.push(2 ** p);
    return ticks;
  }

  // Range (in axis units), ticks, and where a value is drawn; zeros of a log axis stand on its floor.
  function scaleOf(spec, points) {
    const all = points.flat();
    if (spec.unit === "bytes" || spec.unit === "log") {
      const least = spec.unit === "log" ? data.klFloor : 0;
      const positive = all.filter((v) => v > least);
      const low = positive.length ? Math.min(...positive) : 1e-3, high = positive.length ? Math.max(...positive) : 1;
      const centres = points.map((p) => p[0]), zeros = centres.some((v) => v <= least);
      const lowest = Math.min(...centres.filter((v) => v > least), high);
      const start = Math.min(Math.max(low, lowest / 8), high / (spec.unit === "log" ? 10 : 2));
      const pad = Math.max(0.12, 0.09 * Math.log10(high / start));
      const floor = zeros ? 10 ** (Math.log10(start) - 3 * pad) : null;
      const range = [Math.log10(floor ?? start) - (zeros ? 0.6 : 1) * pad, Math.log10(high) + pad];
      const inner = zeros ? start / 10 ** (pad * 0.6) : 10 ** range[0];
      const ticks = spec.unit === "bytes" ? doublings(inner, 10 ** range[1]) : decades(inner, 10 ** range[1]);
      const text = ticks.map((v) => (spec.unit === "bytes" ? bytes(v).replace(/\.0+ /, " ") : v >= 0.001 ? String(+v.toPrecision(1)) : v.toExponential(0)));
      return {
        type: "log", range, floor, at: (v) => Math.log10(v > least ? Math.max(v, 10 ** range[0]) : floor ?? 10 ** range[0]),
        data: (v) => (v > least ? Math.max(v, 10 ** range[0]) : floor ?? 10 ** range[0]),
        tickvals: floor === null ? ticks : [floor, ...ticks], ticktext: floor === null ? text : ["0", ...text],
      };
    }
    let low = Math.min(...all), high = Math.max(...all);
    const pad = Math.max(0.1 * (high - low), spec.unit === "percent" ? 0.02 : 0.03 * Math.abs(high), 1e-9);
    low = spec.unit === "ms" ? 0 : low - pad;
    high += pad;
    if (spec.unit === "percent") { low = Math.max(low, -0.03); high = Math.min(high, 1.03); }
    return { type: "linear", range: [low, high], floor: null, at: (v) => v, data: (v) => v, tickformat: spec.unit === "percent" ? ".0%" : "" };
  }

  // No row is at least as good in both and better in one.
  function frontOf(rows, x, y) {
    const sign = y.lowIsGood ? 1 : -1;
    const of = (row) => [row.points[x.key][0], y.unit === "log" ? Math.max(row.points[y.key][0], data.klFloor) : sign * row.points[y.key][0]];
    return rows.filter((row) => {
      const [a, b] = of(row);
      return !rows.some((other) => { const [c, d] = of(other); return other !== row && c <= a && d <= b && (c < a || d < b); });
    }).sort((p, q) => of(p)[0] - of(q)[0] || of(p)[1] - of(q)[1]);
  }

  // Labels beside their points, where they hide the least.
  function placeLabels(items, boxes, width, height) {
    const overlap = (a, b) => Math.max(0, Math.min(a.x1, b.x1) - Math.max(a.x0, b.x0)) * Math.max(0, Math.min(a.y1, b.y1) - Math.max(a.y0, b.y0));
    const placed = [];
    for (const item of items) {
      const w = item.width + 4, h = 16;
      let best = null;
      for (const radius of [0, 10, 22, 36, 54, 76, 100]) {
        for (let k = 0; k < 16; k += 1) {
          const turn = (k * Math.PI) / 8, c = Math.cos(turn), s = Math.sin(turn);
          const dx = c * (radius + 9) + (Math.abs(c) < 0.3 ? 0 : Math.sign(c) * w / 2), dy = s * (radius + 9) + (Math.abs(s) < 0.3 ? 0 : Math.sign(s) * h / 2);
          const box = { x0: item.x + dx - w / 2, x1: item.x + dx + w / 2, y0: item.y + dy - h / 2, y1: item.y + dy + h / 2 };
          let price = radius * 2.2 + (k === 0 ? 0 : k === 8 ? 3 : k % 4 === 0 ? 5 : 7);
          for (const other of placed) price += 9 * overlap(box, other);
          for (const other of boxes) price += other.weight * overlap(box, other);
          if (box.x0 < 2 || box.x1 > width - 2 || box.y0 < 2 || box.y1 > height - 2) price += 2000;
          if (best === null || price < best.price) best = { price, dx, dy, box, far: radius > 10 };
        }
      }
      placed.push(best.box);
      Object.assign(item, { dx: best.dx, dy: best.dy, far: best.far });
    }
  }

  function pareto() {
    const node = byId("pareto");
    const y = data.quality.find((a) => a.key === byId("quality").value), x = data.cost.find((a) => a.key === byId("cost").value);
    const rows = y && x ? data.rows.filter((row) => row.points[y.key] && row.points[x.key]) : [];
    if (!rows.length) {
      node.setAttribute("aria-label", "No row has both a quality and a cost");
      return empty(node, "No row of this comparison has both a quality and a cost.");
    }
    const sx = scaleOf(x, rows.map((row) => row.points[x.key])), sy = scaleOf(y, rows.map((row) => row.points[y.key]));
    const height = 470, margin = { l: 68, r: 16, t: 12, b: 58 };
    const width = node.clientWidth - margin.l - margin.r, tall = height - margin.t - margin.b;
    const px = (v) => ((sx.at(v) - sx.range[0]) / (sx.range[1] - sx.range[0])) * width;
    const py = (v) => tall - ((sy.at(v) - sy.range[0]) / (sy.range[1] - sy.range[0])) * tall;
    const front = frontOf(rows, x, y);

    const traces = [{
      x: front.map((row) => sx.data(row.points[x.key][0])), y: front.map((row) => sy.data(row.points[y.key][0])), mode: "lines",
      line: { shape: "hv", color: "#9aa4ae", width: 1.5 }, hoverinfo: "skip",
    }];
    const bars = (point, scale, colour) => ({
      type: "data", symmetric: false, array: [scale.data(point[2]) - scale.data(point[0])], arrayminus: [scale.data(point[0]) - scale.data(point[1])],
      color: colour, thickness: 1.2, width: 3,
    });
    // Open marks are filled with white, so that lines do not run through them.
    const mark = (row) => (row.dense ? { symbol: row.symbol, size: 11, color: row.colour, line: { width: 2, color: row.colour } }
      : row.symbol.endsWith("-open") ? { symbol: row.symbol.slice(0, -5), size: 11, color: "#fff", line: { width: 2, color: row.colour } }
      : { symbol: row.symbol, size: 12.5, color: row.colour, line: { width: 1, color: "#fff" } });
    for (const row of rows) {
      const a = row.points[x.key], b = row.points[y.key];
      const line = (spec, p) => `${capital(spec.title)}: ${show[spec.unit](p[0])}` + (p[2] > p[1] ? ` (${show[spec.unit](Math.max(p[1], 0))} – ${show[spec.unit](p[2])})` : "");
      traces.push({
        x: [sx.data(a[0])], y: [sy.data(b[0])], mode: "markers", name: plain(row.label), error_x: bars(a, sx, row.colour), error_y: bars(b, sy, row.colour),
        marker: mark(row),
        hoverinfo: "text", hovertext: `<b>${plain(row.label)}</b><br>${plain(line(y, b))}<br>${plain(line(x, a))}`,
      });
    }

    // What a label should not hide: marks, error bars, the front, the corner sign.
    const boxes = [];
    for (const row of rows) {
      const [u, ulow, uhigh] = row.points[x.key].map(px), [v, vlow, vhigh] = row.points[y.key].map(py);
      boxes.push({ x0: u - 8, x1: u + 8, y0: v - 8, y1: v + 8, weight: 6 });
      boxes.push({ x0: u - 2, x1: u + 2, y0: Math.min(vlow, vhigh), y1: Math.max(vlow, vhigh), weight: 3 });
      boxes.push({ x0: ulow, x1: uhigh, y0: v - 2, y1: v + 2, weight: 3 });
    }
    front.slice(1).forEach((row, i) => {
      const u0 = px(front[i].points[x.key][0]), v0 = py(front[i].points[y.key][0]), u1 = px(row.points[x.key][0]), v1 = py(row.points[y.key][0]);
      boxes.push({ x0: u0, x1: u1, y0: v0 - 1.5, y1: v0 + 1.5, weight: 1.2 });
      boxes.push({ x0: u1 - 1.5, x1: u1 + 1.5, y0: Math.min(v0, v1), y1: Math.max(v0, v1), weight: 1.2 });
    });
    const above = sy.floor === null ? 4 : tall - py(0) + 4;
    boxes.push({ x0: 0, x1: 62, y0: y.lowIsGood ? tall - above - 20 : 0, y1: y.lowIsGood ? tall - above : 24, weight: 6 });
    const most = width < 600 ? 18 : 30;
    const items = rows.map((row) => {
      const text = short(row.label, most), on = front.includes(row);
      return { row, text, on, x: px(row.points[x.key][0]), y: py(row.points[y.key][0]), width: widthOf(text, `${on ? "600 " : ""}12.5px ${FONT}`) };
    });
    items.sort((p, q) => q.x - p.x);
    placeLabels(items, boxes, width, tall);
    const annotations = items.map((item) => ({
      x: sx.at(item.row.points[x.key][0]), y: sy.at(item.row.points[y.key][0]), ax: item.dx, ay: item.dy, xanchor: "center", yanchor: "middle",
      text: item.on ? `<b>${plain(item.text)}</b>` : plain(item.text), showarrow: true, arrowhead: 0, arrowwidth: 0.8, standoff: 8, borderpad: 0,
      arrowcolor: item.far ? "#a6afb8" : "rgba(0,0,0,0)", font: { size: 12.5, color: item.row.dense ? SOFT : INK },
    }));
    annotations.push({
      xref: "paper", yref: "paper", x: 0, y: y.lowIsGood ? 0 : 1, xanchor: "left", yanchor: y.lowIsGood ? "bottom" : "top", xshift: 6, yshift: y.lowIsGood ? above : -4,
      text: y.lowIsGood ? "↙ better" : "↖ better", showarrow: false, font: { size: 12, color: SOFT },
    });
    const shapes = sy.floor === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: sy.floor, y1: sy.floor, line: { color: "#c8ced5", width: 1 }, layer: "below" }];
    const words = {
      log: `${capital(y.title)}, nats a token (log axis${sy.floor === null ? "" : ", 0 apart"})`, percent: capital(y.title), number: capital(y.title),
    };
    node.setAttribute("aria-label", `Scatter plot of ${y.title} against ${x.title} for ${rows.length} rows. Not beaten in both: ${front.map((row) => row.label).join(", ")}.`);
    const layout = base({
      height, margin, annotations, shapes, hovermode: "closest",
      xaxis: axis({ type: sx.type, range: sx.range, tickvals: sx.tickvals, ticktext: sx.ticktext, title: { text: x.unit === "bytes" ? "Cache bytes read per token (log axis)" : "Milliseconds per token", font: { size: 13, color: INK }, standoff: 12 } }),
      yaxis: axis({ type: sy.type, range: sy.range, tickvals: sy.tickvals, ticktext: sy.ticktext, tickformat: sy.tickformat, title: { text: plain(words[y.unit]), font: { size: 13, color: INK }, standoff: 8 } }),
    });
    return draw(node, traces, layout);
  }

  // Where a token's time goes

  const PARTS = [
    ["model", "Model (everything but attention)", "#c3cad2", ""],
    ["attention", "Attention", "#0072b2", ""],
    ["overhead", "Overhead", "#e69f00", "/"],
  ];
  function steps() {
    const node = byId("steps"), rows = data.rows.filter((row) => row.time);
    if (!rows.length) {
      node.setAttribute("aria-label", "No row was timed");
      return empty(node, "No row of this comparison was timed.");
    }
    const most = node.clientWidth < 700 ? 18 : 34, font = `12.5px ${FONT}`;
    const labels = rows.map((row) => short(row.label, most)), place = rows.map((_, i) => i);
    const left = Math.min(260, 16 + Math.max(...labels.map((text) => widthOf(text, font))));
    const traces = [];
    const bar = (name, values, colour, shape, text) => ({
      type: "bar", orientation: "h", y: place, x: values, name, width: 0.62, customdata: rows.map((row) => plain(row.label)),
      marker: { color: colour, line: { color: "#fff", width: 0.8 }, ...(shape ? { pattern: { shape, fgcolor: "#fff", bgcolor: colour, size: 5, solidity: 0.25 } } : {}) },
      hovertemplate: `<b>%{customdata}</b><br>${text}: %{x:.3~g} ms<extra></extra>`,
    });
    if (rows.some((row) => row.time.attention !== null)) {
      for (const [key, name, colour, shape] of PARTS) {
        if (rows.some((row) => row.time[key])) traces.push(bar(name, rows.map((row) => row.time[key] ?? 0), colour, shape, name));
      }
    }
    const whole = rows.map((row) => (row.time.attention === null ? row.time.total : 0));
    if (whole.some((v) => v > 0)) traces.push(bar("Not split", whole, "#e8ebee", "", "Whole step"));
    if (rows.some((row) => row.time.least !== null)) {
      traces.push({
        type: "scatter", mode: "markers", x: rows.map((row) => row.time.least), y: place, name: "Time to read its bytes", customdata: rows.map((row) => plain(row.label)),
        marker: { symbol: "line-ns", size: 21, color: INK, line: { width: 2, color: INK } }, hovertemplate: "<b>%{customdata}</b><br>Time to read its bytes: %{x:.3~g} ms<extra></extra>",
      });
    }
    byId("parts").replaceChildren(...traces.map((trace) => {
      const item = document.createElement("li"), swatch = document.createElement("i");
      swatch.className = trace.type === "bar" ? (trace.marker.pattern ? "striped" : "") : "line";
      swatch.style.setProperty("--swatch", trace.marker.color);
      item.append(swatch, trace.name);
      return item;
    }));
    const ends = rows.map((row) => Math.max(row.time.total, (row.time.model ?? 0) + (row.time.attention ?? 0) + (row.time.overhead ?? 0)));
    const annotations = rows.map((row, i) => ({
      x: Math.max(ends[i], row.time.least ?? 0), y: i, text: show.ms(row.time.total), showarrow: false, xanchor: "left", xshift: 7, font: { size: 12.5, color: INK },
    }));
    node.setAttribute("aria-label", "Stacked bars of milliseconds per token: " + rows.map((row) => `${row.label} ${show.ms(row.time.total)}` +
      (row.time.attention === null ? "" : `, of which attention ${show.ms(row.time.attention)}`)).join("; ") + ".");
    return draw(node, traces, base({
      height: 54 + 32 * rows.length, margin: { l: left, r: 16, t: 6, b: 48 }, barmode: "stack", annotations, hovermode: "closest",
      xaxis: axis({ range: [0, (node.clientWidth < 700 ? 1.25 : 1.1) * Math.max(...ends, ...rows.map((row) => row.time.least ?? 0))], title: { text: "Milliseconds per token", font: { size: 13 }, standoff: 10 } }),
      yaxis: axis({ range: [rows.length - 0.5, -0.5], tickvals: place, ticktext: labels.map(plain), showgrid: false, ticks: "", ticklabelstandoff: 6, tickfont: { size: 12.5, color: INK } }),
    }), STILL);
  }

  // What was read

  function decode(picture) {
    if (picture.values) return picture;
    const raw = atob(picture.density), values = new Float32Array(raw.length / 2);
    for (let i = 0; i < values.length; i += 1) values[i] = (raw.charCodeAt(2 * i) + 256 * raw.charCodeAt(2 * i + 1)) / 65535;
    picture.values = values;
    picture.bins = picture.edges.length - 1;
    return picture;
  }
  const one = (picture, layer, head) => Array.from(picture.values.subarray((layer * picture.heads + head) * picture.bins, (layer * picture.heads + head + 1) * picture.bins));
  const meanOverHeads = (picture) => picture.layers.map((_, layer) => {
    const sum = new Array(picture.bins).fill(0);
    for (let head = 0; head < picture.heads; head += 1) one(picture, layer, head).forEach((v, i) => { sum[i] += v / picture.heads; });
    return sum;
  });
  function heatmap(picture, rows, noun, names) {
    const edges = picture.edges.map((share) => share * data.context);
    return {
      type: "heatmap", z: rows.map((row) => row.map((v) => Math.sqrt(Math.min(1, v)))), x: edges, y: rows.map((_, i) => i), zmin: 0, zmax: 1, colorscale: RAMP, showscale: false,
      customdata: rows.map((row, i) => row.map((v, j) => [percent(v), `${noun} ${names[i]}`, `${Math.round(edges[j]).toLocaleString("en")} – ${Math.round(edges[j + 1]).toLocaleString("en")}`])),
      hovertemplate: "%{customdata[1]}, tokens %{customdata[2]}<br>%{customdata[0]} of the rows read<extra></extra>",
    };
  }
  const tokens = (v) => (v >= 1024 ? +(v / 1024).toFixed(1) + "K" : String(Math.round(v)));
  function heatAxes(names, noun, height, count) {
    const quarter = count === undefined ? [0, 0.25, 0.5, 0.75, 1] : count;
    const step = Math.max(1, Math.ceil(names.length / Math.max(2, Math.floor(height / 17))));
    const shown = names.map((name, i) => [i, name]).filter(([i]) => i % step === 0);
    return {
      xaxis: axis({ range: [0, data.context], tickvals: quarter.map((q) => q * data.context), ticktext: quarter.map((q) => tokens(q * data.context)), showgrid: false, mirror: true, tickfont: { size: 11, color: SOFT } }),
      yaxis: axis({ range: [names.length - 0.5, -0.5], tickvals: shown.map(([i]) => i), ticktext: shown.map(([, name]) => String(name)), showgrid: false, mirror: true, tickfont: { size: 11, color: SOFT }, title: { text: noun, font: { size: 11.5, color: SOFT }, standoff: 5 } }),
    };
  }
  const thumbnails = [];
  function makeThumbnails() {
    for (const picture of data.selections) {
      decode(picture);
      const figure = document.createElement("figure"), caption = document.createElement("figcaption"), note = document.createElement("small"), plot = document.createElement("div");
      caption.append(picture.label, note);
      note.textContent = capital(picture.summary);
      plot.className = "plot";
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `Heat map of layers by position: ${picture.label} ${picture.summary}.`);
      figure.append(caption, plot);
      byId("thumbnails").append(figure);
      thumbnails.push([picture, plot]);
    }
  }
  function drawThumbnails() {
    for (const [picture, plot] of thumbnails) {
      const height = 190, margin = { l: 44, r: 12, t: 4, b: 24 };
      draw(plot, [heatmap(picture, meanOverHeads(picture), "Layer", picture.layers)], base({ height, margin, ...heatAxes(picture.layers, "layer", height - 28) }), STILL);
    }
  }
  function heads() {
    const picture = data.selections[+byId("method").value], chosen = byId("layer").value, node = byId("heads");
    const all = chosen === "all", names = all ? picture.layers : Array.from({ length: picture.heads }, (_, i) => i);
    const rows = all ? meanOverHeads(picture) : names.map((head) => one(picture, +chosen, head));
    const inner = Math.max(90, Math.min(640, rows.length * 20)), margin = { l: 58, r: 16, t: 6, b: 46 };
    const what = all ? "each layer, mean over heads" : `each head of layer ${picture.layers[+chosen]}`;
    node.setAttribute("aria-label", `Heat map of the rows read by ${what}: ${picture.label}.`);
    byId("heads-caption").textContent = `${picture.label}: share of the rows in each stretch of ${Math.round(data.context / picture.bins).toLocaleString("en")} tokens read by ${what}.` +
      (picture.merged > 1 ? ` ${picture.merged} recorded stretches are averaged into one, to keep this file small.` : "");
    const layout = base({ height: inner + margin.t + margin.b, margin, ...heatAxes(names, all ? "layer" : "head", inner, [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]) });
    layout.xaxis.title = { text: "Position in the context, tokens", font: { size: 12.5, color: SOFT }, standoff: 8 };
    return draw(node, [heatmap(picture, rows, all ? "Layer" : "Head", names)], layout, STILL);
  }
  function layersOf() {
    const picture = data.selections[+byId("method").value], before = byId("layer").selectedOptions[0]?.textContent;
    fill(byId("layer"), [["all", "all, mean over heads"], ...picture.layers.map((layer, i) => [String(i), String(layer)])]);
    const same = Array.from(byId("layer").options).find((option) => option.textContent === before);
    byId("layer").value = same ? same.value : String(Math.floor(picture.layers.length / 2));
  }

  // Everything together

  function redraw() { pareto(); steps(); if (thumbnails.length) { drawThumbnails(); heads(); } }

  fill(byId("quality"), usable(data.quality).map((a) => [a.key, capital(a.title)]));
  fill(byId("cost"), usable(data.cost).map((a) => [a.key, capital(a.title)]));
  byId("quality").addEventListener("change", pareto);
  byId("cost").addEventListener("change", pareto);
  if (data.selections.length) {
    byId("pictures").hidden = false;
    makeThumbnails();
    fill(byId("method"), data.selections.map((picture, i) => [String(i), picture.label]));
    const first = data.selections.findIndex((picture) => !data.rows[picture.row].baseline);
    byId("method").value = String(Math.max(0, first));
    layersOf();
    byId("method").addEventListener("change", () => { layersOf(); heads(); });
    byId("layer").addEventListener("change", heads);
  } else {
    byId("no-pictures").hidden = false;
  }
  redraw();
  let wait = 0, drawnAt = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    clearTimeout(wait);
    wait = setTimeout(() => { if (document.documentElement.clientWidth !== drawnAt) { drawnAt = document.documentElement.clientWidth; redraw(); } }, 120);
  });
  window.matchMedia("print").addEventListener("change", redraw);
})();
