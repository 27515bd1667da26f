// Keeps the page as it is now: asks a few addresses now and then, and shows what has changed.

import * as parts from "./parts.js";
import { bucketPlot, curvePlot, lossPlot, timestepPlot } from "./plots.js";
import { capital, several, size, whole } from "./words.js";

const $ = (selector) => document.querySelector(selector);
const known = { status: null, runs: { runs: [], evaluation: null }, tags: new Map(), trouble: new Set() };
const shown = { evaluation: "", choices: "", page: 0, digest: "" };

function live() {
  const where = $("#live");
  where.classList.toggle("alarm", known.trouble.size > 0);
  where.textContent = known.trouble.size ? "No answer just now; trying again" : "Live";
}

// The answer of `address` where it is another than the last time, else null.
async function ask(address) {
  const answer = await fetch(address, { cache: "no-cache" });
  if (!answer.ok) throw new Error(await answer.text());
  const tag = answer.headers.get("etag");
  if (known.tags.get(address) === tag) return null;
  const made = await answer.json();
  known.tags.set(address, tag);
  return made;
}

// Ask again and again while somebody looks; `render` may say that more is to come at once.
async function keep(address, everyMs, render) {
  let pauseMs = everyMs;
  if (!document.hidden) {
    try {
      const made = await ask(address);
      known.trouble.delete(address);
      if (made !== null) pauseMs = render(made) ? 150 : everyMs;
    } catch {
      known.trouble.add(address);
    }
    live();
  }
  setTimeout(() => keep(address, everyMs, render), pauseMs);
}

function renderNow() {
  if (!known.status) return;
  parts.fill($("#now"), parts.buildCard(known.status), ...known.runs.runs.map(parts.runCard));
}

function renderStatus(status) {
  known.status = status;
  const { store, service } = status;
  renderNow();
  document.title = `${service?.is_alive && service.state === "building" ? "building · " : ""}sdxl-experts`;
  const why = store.why ?? (store.data.length ? "" : "No manifest is sealed yet: the first build that completes seals one.");
  parts.say($("#data .empty"), capital([why, ...store.manifests_why].filter(Boolean).join(" ")));
  parts.fill($("#data .tiles"), ...(store.why ? [] : parts.tiles(store)));
  $('[data-plot="buckets"]').hidden = !store.data.length;
  if (store.data.length) bucketPlot(merged(store.data));
  renderAside(store, service);
  renderManifests();
  offerChoices(store.data);
  document.body.dataset.ready = "status";
}

function merged(data) {
  const all = new Map();
  for (const bucket of data.flatMap((one) => one.buckets)) {
    const name = `${bucket.h}x${bucket.w}`;
    const before = all.get(name) ?? { ...bucket, train: 0, eval: 0 };
    all.set(name, { ...before, train: before.train + bucket.train, eval: before.eval + bucket.eval });
  }
  return [...all.values()].sort((one, other) => one.w / one.h - other.w / other.h);
}

function renderAside(store, service) {
  const rows = [...(service?.quarantine ?? []), ...store.bad_records];
  const [pictures, records] = [service?.quarantined ?? 0, store.bad_records.length];
  const count = pictures + records;
  const found = [pictures ? several(pictures, "picture", "pictures") : "", records ? several(records, "record", "records") : ""];
  const about = count ? `${found.filter(Boolean).join(" and ")} could not be used; everything else was.` : "Nothing: every picture that was found could be used.";
  const unknown = service ? "Not known yet: no build has looked at the pictures since the service started." : "What a build could not use is told here where the service runs it; cache-build prints it itself.";
  parts.say($("#aside .about"), count || service?.quarantined != null ? about : unknown);
  parts.fill($("#aside .lines"), ...rows.map(parts.asideLine));
  if (count > rows.length) $("#aside .lines").append(parts.el("li", {}, `and ${whole(count - rows.length)} more`));
}

function renderManifests() {
  const rows = known.status?.store.manifests ?? [];
  parts.say($("#manifests .empty"), rows.length ? "" : "None yet.");
  parts.fill($("#manifests .lines"), ...rows.map((one) => parts.manifestLine(one, known.runs.runs)));
}

function renderRuns(answer) {
  known.runs = answer;
  const { runs, evaluation } = answer;
  renderNow();
  renderManifests();
  const hasBegun = runs.some((run) => run.step > 0 || run.bins.length);
  parts.say($("#experts .empty"), runs.length ? (hasBegun ? "" : "No step is logged yet.") : "No training is shown yet: runs are the folders that --run names and those below --runs-under, for a service what runs and runs_under say.");
  $("#experts .plots").hidden = !hasBegun;
  if (hasBegun) {
    timestepPlot(runs);
    lossPlot(runs);
    curvePlot("rate", "learning_rate", runs);
    curvePlot("speed", "steps_per_s", runs);
    document.body.dataset.drawn = answer.is_read ? "all" : "some";
  }
  renderDrawn(evaluation);
  return !answer.is_read;
}

function renderDrawn(evaluation) {
  const about = $("#drawn .about");
  if (!evaluation) {
    about.textContent = "None yet. evaluate-experts --watch draws them while both experts train; its folder is named like a run's.";
    parts.fill($("#drawn .rows"));
    shown.evaluation = "";
    return;
  }
  const name = `${evaluation.id}/${evaluation.round}/${evaluation.at}`;
  if (name === shown.evaluation) return;
  shown.evaluation = name;
  const experts = evaluation.experts.map((one) => (one.state === "judged" ? `${one.name} at step ${whole(one.step)}` : `${one.name}: ${one.state}`));
  const ways = evaluation.ways.map((way) => `${way.who}: loss ${way.loss?.toPrecision(4) ?? "?"}${way.clip == null ? "" : `, CLIP score ${way.clip.toFixed(2)}`}`);
  about.textContent = [`Round ${evaluation.round}, ${experts.join(", ")}`, ...ways].join(" · ");
  const rows = [...evaluation.prompts, ...evaluation.held_out];
  parts.fill($("#drawn .rows"), ...rows.map((row) => parts.drawnRow(evaluation, row)));
}

function renderEvents({ events }) {
  const colours = new Map(known.runs.runs.map((run, at) => [run.name, `e${at % 6}`]));
  parts.say($("#events .empty"), events.length ? "" : "Nothing has happened yet.");
  parts.fill($("#events .lines"), ...events.map((event) => parts.eventLine(event, colours)));
}

// --- the gallery ---

const form = $("#gallery form");

function options(select, pairs) {
  const before = select.value;
  parts.fill(select, ...pairs.map(([value, text]) => parts.el("option", { value }, text)));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

function offerChoices(data) {
  const choices = JSON.stringify(data.map((one) => [one.name, one.digest]));
  form.hidden = !data.length;
  if (choices === shown.choices) return;
  shown.choices = choices;
  options(form.elements.manifest, data.map((one) => [one.name, `${one.name} (${whole(one.samples)})`]));
  form.elements.manifest.parentElement.hidden = data.length < 2;
  offerBuckets();
  renderGallery();
}

function offerBuckets() {
  const one = known.status.store.data.find((each) => each.name === form.elements.manifest.value);
  const buckets = (one?.buckets ?? []).map(({ h, w, train, eval: held }) => [`${h}x${w}`, `${size([h, w])} (${whole(train + held)})`]);
  options(form.elements.bucket, [["", "all"], ...buckets]);
}

async function renderGallery() {
  const { manifest, bucket, split } = form.elements;
  const asked = new URLSearchParams({ manifest: manifest.value, bucket: bucket.value, split: split.value, page: shown.page });
  const where = $("#gallery .samples");
  if (!manifest.value) {
    parts.fill(where);
    parts.say($("#gallery .empty"), "Nothing to show yet.");
    return;
  }
  try {
    const answer = await fetch(`/api/gallery?${asked}`);
    if (!answer.ok) throw new Error(await answer.text());
    const page = await answer.json();
    shown.page = page.page;
    const pictures = { sources: page.has_sources, preview: page.has_preview };
    parts.say($("#gallery .empty"), page.cards.length ? "" : "No such picture.");
    parts.fill(where, ...page.cards.map((card) => parts.sample(page.digest, card, pictures, openCloser)));
    form.querySelector("output").textContent = `${page.page + 1} of ${whole(page.pages)}`;
    form.elements.back.disabled = page.page === 0;
    form.elements.next.disabled = page.page + 1 >= page.pages;
  } catch (error) {
    parts.say($("#gallery .empty"), `The gallery cannot be shown: ${error.message}`);
  }
}

function openCloser(one, pictures) {
  parts.fill($("#closer > div"), ...parts.closer(one, pictures));
  $("#closer").showModal();
}

form.addEventListener("change", (event) => {
  if (event.target.name === "manifest") offerBuckets();
  shown.page = 0;
  renderGallery();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.elements.back.addEventListener("click", () => turn(-1));
form.elements.next.addEventListener("click", () => turn(1));

function turn(by) {
  shown.page += by;
  renderGallery();
}

keep("/api/status", 2000, renderStatus);
keep("/api/runs", 3000, renderRuns);
keep("/api/events", 5000, renderEvents);
document.addEventListener("visibilitychange", live);
