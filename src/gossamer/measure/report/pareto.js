// Quality against cost

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

