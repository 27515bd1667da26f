// The curves, by uPlot. Each plot keeps its place and its zoom while new points come.

import { digits, whole } from "./words.js";

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const colourOf = (at) => style(`--e${at % 6}`);
const clear = (colour, share) => colour + Math.round(share * 255).toString(16).padStart(2, "0");

const plots = new Map(); // name -> {draw, shape, plot}

const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => {
  for (const kept of plots.values()) kept.shape = "";
  for (const kept of plots.values()) kept.draw?.();
});

// Where values spread over more than a decade and a half, an axis of powers tells more.
function isWide(columns) {
  const values = columns.flat().filter((value) => value > 0);
  return values.length > 1 && Math.max(...values) / Math.min(...values) > 30;
}

function axes(xLabel, format, extra = {}) {
  const ink = { stroke: style("--muted"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
  const y = { ...ink, size: 58, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : format(tick))) };
  return [{ ...ink, label: xLabel, space: 72, labelSize: 18, labelFont: "12px system-ui, sans-serif", size: 34, ...extra }, y];
}

// What stands before a name: the colour of its line or bar.
function swatch(series) {
  const paint = (name) => (typeof series[name] === "function" ? series[name]() : series[name]);
  return paint("stroke") ?? paint("fill");
}

// Show `data` in the plot `name`; it is made anew only where what stands in it (`shape`) has changed.
function show(name, shape, data, options) {
  const kept = plots.get(name) ?? {};
  plots.set(name, kept);
  kept.draw = () => show(name, shape, data, options);
  const box = document.querySelector(`[data-plot="${name}"] > div`);
  if (kept.plot && kept.shape === shape) {
    kept.plot.setData(data);
    return;
  }
  kept.plot?.destroy();
  kept.shape = shape;
  const hidden = options.hidden ?? [];
  const height = options.height ?? 240;
  const made = { width: Math.max(200, box.clientWidth), height, ...options.make(), legend: { live: true, markers: { width: 0, fill: (u, at) => swatch(u.series[at]) } } };
  kept.plot = new uPlot(made, data, box);
  kept.plot.root.querySelectorAll(".u-series").forEach((row, at) => row.classList.toggle("unlisted", hidden.includes(at)));
  kept.watch ??= new ResizeObserver(() => {
    if (kept.plot && box.clientWidth > 0 && box.clientWidth !== kept.plot.width) kept.plot.setSize({ width: box.clientWidth, height });
  });
  kept.watch.observe(box);
}

const value = (_, raw) => (raw == null ? "–" : digits(raw));
const step = { label: "step", value: (_, raw) => (raw == null ? "–" : whole(raw)) };
const cursor = { points: { size: 6 }, drag: { x: true, y: false } };

function steps(bins, at) {
  const last = bins.at(-1);
  return [[...bins.map(([low]) => low), last[1]], [...bins.map((bin) => bin[at]), last[at]]];
}

export function timestepPlot(runs) {
  const tables = [];
  const series = [];
  runs.forEach((run, at) => {
    for (const [bins, name, dash] of [[run.bins, "", null], [run.eval_bins, " held out", [5, 4]]]) {
      if (!bins?.length) continue;
      tables.push(steps(bins, 2));
      series.push({ at, label: run.name + name, dash });
    }
  });
  const isLog = isWide(tables.map((table) => table[1]));
  const shape = JSON.stringify([series.map((one) => [one.label, one.at]), isLog, runs.map((run) => [run.low, run.high])]);
  const bands = (u) => {
    const { left, top, width, height } = u.bbox;
    runs.forEach((run, at) => {
      if (run.low == null) return;
      const from = Math.max(left, u.valToPos(run.low, "x", true));
      const to = Math.min(left + width, u.valToPos(run.high, "x", true));
      u.ctx.fillStyle = clear(colourOf(at), 0.08);
      u.ctx.fillRect(from, top, to - from, height);
    });
  };
  show("timesteps", shape, tables.length ? uPlot.join(tables) : [[0, 1000]], {
    make: () => ({
      cursor,
      hooks: { drawClear: [bands] },
      scales: { x: { time: false, range: [0, 1000] }, y: { distr: isLog ? 3 : 1 } },
      axes: axes("timestep", digits),
      series: [{ label: "timestep", value: (_, raw) => raw ?? "–" }, ...series.map((one) => ({ label: one.label, stroke: colourOf(one.at), width: 2, dash: one.dash, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false }, value }))],
    }),
  });
}

export function lossPlot(runs) {
  const tables = [];
  const series = [];
  const bands = [];
  const hidden = [];
  runs.forEach((run, at) => {
    if (run.curves.step?.length) {
      const first = series.length + 1;
      tables.push([run.curves.step, run.curves.loss_high, run.curves.loss_low, run.curves.loss]);
      series.push({ at, label: `${run.name} highest`, width: 0 }, { at, label: `${run.name} lowest`, width: 0 }, { at, label: run.name, width: 1.2 });
      hidden.push(first, first + 1);
      bands.push({ series: [first, first + 1], at });
    }
    if (run.evals.step?.length) {
      tables.push([run.evals.step, run.evals.loss]);
      series.push({ at, label: `${run.name} held out`, width: 2, isDots: true });
    }
  });
  const isLog = isWide(tables.flatMap((table) => table.slice(1)));
  const shape = JSON.stringify([series, isLog]);
  show("loss", shape, tables.length ? uPlot.join(tables) : [[0, 1]], {
    hidden,
    make: () => ({
      cursor,
      scales: { x: { time: false }, y: { distr: isLog ? 3 : 1 } },
      axes: axes("step", digits),
      bands: bands.map((band) => ({ series: band.series, fill: clear(colourOf(band.at), 0.18) })),
      series: [step, ...series.map((one) => ({ label: one.label, stroke: colourOf(one.at), width: one.width, value, points: one.isDots ? { show: true, size: 6, fill: colourOf(one.at) } : { show: false }, dash: one.isDots ? [6, 4] : null }))],
    }),
  });
}

export function curvePlot(name, field, runs) {
  const drawn = runs.map((run, at) => ({ run, at })).filter(({ run }) => run.curves.step?.length);
  const tables = drawn.map(({ run }) => [run.curves.step, run.curves[field]]);
  const shape = JSON.stringify(drawn.map(({ run, at }) => [run.name, at]));
  show(name, shape, tables.length ? uPlot.join(tables) : [[0, 1]], {
    height: 180,
    make: () => ({
      cursor,
      scales: { x: { time: false }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: axes("step", digits),
      series: [step, ...drawn.map(({ run, at }) => ({ label: run.name, stroke: colourOf(at), width: 1.5, value, points: { show: false } }))],
    }),
  });
}

export function bucketPlot(buckets) {
  const names = buckets.map((one) => `${one.h}×${one.w}`);
  const at = buckets.map((_, index) => index);
  const all = buckets.map((one) => one.train + one.eval);
  const bars = uPlot.paths.bars({ size: [0.7, 60] });
  show("buckets", JSON.stringify(names), [at, all, buckets.map((one) => one.train)], {
    height: 220,
    make: () => ({
      cursor: { points: { show: false }, drag: { x: false, y: false } },
      scales: { x: { time: false, range: [-0.6, Math.max(0.6, names.length - 0.4)] }, y: { range: (_, low, high) => [0, (high || 1) * 1.08] } },
      axes: axes("", whole, {
        splits: () => at,
        values: (_, ticks) => ticks.map((tick) => names[tick] ?? ""),
        rotate: names.length > 5 ? -60 : 0,
        size: names.length > 5 ? 70 : 34,
        grid: { show: false },
        labelSize: 0,
        filter: (u, ticks) => thinned(u, ticks),
      }),
      series: [
        { label: "size", value: (_, raw) => names[raw] ?? "–" },
        { label: "all", fill: clear(colourOf(2), 0.4), paths: bars, points: { show: false }, value: (_, raw) => whole(raw) },
        { label: "trained on", fill: colourOf(2), paths: bars, points: { show: false }, value: (_, raw) => whole(raw) },
      ],
    }),
  });
}

// Names that have room: about 16 px each.
function thinned(u, ticks) {
  const every = Math.max(1, Math.ceil((ticks.length * 16) / Math.max(1, u.bbox.width / devicePixelRatio)));
  return ticks.map((tick) => (tick % every ? null : tick));
}
