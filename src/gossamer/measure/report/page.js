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
const capital = (text) => text[0].toUpperCase() + text.slice(1);
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
const usable = (axes) => axes.filter((a) => data.rows.some((row) => row.points[a.key]));
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
