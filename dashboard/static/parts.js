// Parts of the page. Whatever comes from files (captions, names, reasons) becomes text, never markup.

import { bytes, capital, clock, digits, duration, pace, several, size, whole } from "./words.js";

export function el(tag, attributes = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value != null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...inside.filter((each) => each != null && each !== ""));
  return made;
}

export function fill(where, ...inside) {
  where.replaceChildren(...inside.filter((each) => each != null));
}

export function say(where, text) {
  where.textContent = text;
  where.hidden = !text;
}

function bar(done, total, label, colour) {
  return el("progress", { value: total ? done : 0, max: total || 1, "aria-label": label, class: colour });
}

function facts(pairs) {
  const rows = pairs.filter(([, value]) => value != null);
  return el("dl", {}, ...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function card(title, state, ...inside) {
  const badge = el("span", { class: `state ${state.replaceAll(" ", "-")}` }, state);
  return el("article", { class: "card" }, el("h3", {}, title, badge), ...inside);
}

// How a service is that builds nothing just now.
function restState({ state, phase, last_error, builds }) {
  if (state === "quiet") return "changes seen";
  if (phase) return "waiting";
  if (last_error) return "failed";
  return builds ? "up to date" : "starting";
}

export function buildCard({ store, service }) {
  const writing = store.writer ? el("p", { class: "note" }, `The store is being written: ${store.writer}`) : null;
  if (!service) {
    const about = "No service runs on this store: what follows is read as it stands.";
    const sealed = store.manifests.map((one) => one.sealed_s).filter(Boolean);
    const last = facts([["Last manifest", sealed.length ? clock(Math.max(...sealed)) : null]]);
    return card("Build", store.writer ? "building" : "by hand", el("p", {}, about), writing, last);
  }
  const trouble = service.last_error ? el("p", { class: "alarm" }, service.last_error) : null;
  const seal = service.last_seal;
  const list = facts([
    ["Last manifest", seal?.time_s ? clock(seal.time_s) : null],
    ["Builds", whole(service.builds ?? 0)],
    ["Set aside", whole(service.quarantined)],
  ]);
  const silence = service.is_silent ? el("p", { class: "alarm" }, `The service has said nothing since ${clock(service.beat_s)}: it hangs, or its disk does.`) : null;
  if (!service.is_alive) {
    const when = service.beat_s ? `, last heard of ${clock(service.beat_s)}` : "";
    return card("Build", "no service", el("p", {}, `The service is not running${when}.`), writing, trouble, list);
  }
  if (service.state !== "building") {
    const changed = service.state === "quiet" && service.changed ? `${several(service.changed, "path has", "paths have")} changed; it builds when they have come to rest.` : capital(service.phase ?? "watching for changes.");
    return card("Build", restState(service), el("p", {}, changed), trouble, silence, list);
  }
  const rate = service.images_per_s;
  const left = rate && service.total ? duration((service.total - service.done) / rate) : null;
  return card(
    "Build",
    "building",
    el("p", {}, capital(service.phase ?? "starting") + (service.total ? `: ${whole(service.done)} of ${whole(service.total)}` : "")),
    bar(service.done, service.total, "build"),
    facts([["Speed", rate ? `${digits(rate)} pictures/s` : null], ["Time left", left], ["Set aside", whole(service.quarantined)]]),
    trouble,
    silence,
  );
}

export function runCard(run, at) {
  const share = run.read_share < 0.999 ? el("p", { class: "note" }, `Reading its log: ${Math.round(run.read_share * 100)} %`) : null;
  const range = run.low == null ? "" : `timesteps ${run.low} to ${run.high - 1}`;
  const steps = run.steps ? `step ${whole(run.step)} of ${whole(run.steps)}` : `step ${whole(run.step)}`;
  const made = card(
    run.name,
    run.state,
    el("p", {}, [range, steps].filter(Boolean).join(" · ")),
    bar(run.step, run.steps, `steps of ${run.name}`, `e${at % 6}`),
    run.why ? el("p", { class: "alarm" }, `${run.folder}: ${run.why}`) : null,
    share,
    facts([
      ["Loss", digits(run.loss)],
      ["Learning rate", digits(run.learning_rate)],
      ["Speed", run.steps_per_s == null || run.state !== "training" ? null : pace(run.steps_per_s)],
      ["Time left", run.left_s == null ? null : duration(run.left_s)],
      ["Waiting for data", run.data_wait_share == null ? null : `${(run.data_wait_share * 100).toFixed(1)} %`],
      ["Skipped steps", run.skipped ? whole(run.skipped) : null],
    ]),
  );
  made.classList.add(`e${at % 6}`);
  return made;
}

export function tiles(store) {
  const sum = (name) => store.data.reduce((total, one) => total + one[name], 0);
  const tile = (value, name, about) => el("div", { class: "card tile" }, el("b", {}, value), el("span", {}, name), about ? el("small", {}, about) : null);
  const captions = sum("captions");
  const different = sum("different_captions");
  const reuse = different ? captions / different : 0;
  return [
    tile(whole(sum("samples")), "pictures", `${whole(sum("held_out"))} held out`),
    tile(whole(sum("crops")), "crops"),
    tile(whole(captions), "captions", different ? `${whole(different)} different, each used ${reuse.toFixed(reuse < 10 ? 1 : 0)} times` : ""),
    tile(whole(store.records), "records", "latents, text embeds, facts of both"),
    tile(bytes(store.file_bytes), "on disk", `${bytes(store.used_bytes)} in use`),
  ];
}

export function sample(digest, one, shown, open) {
  const picture = (kind, alt) => {
    const box = el("span", { class: "frame" });
    const image = el("img", { src: `/picture/${digest}/${one.id}/${kind}`, alt, loading: "lazy", decoding: "async" });
    image.addEventListener("error", () => fill(box, el("small", {}, `no ${alt}`)), { once: true });
    box.append(image);
    return box;
  };
  const pictures = el("span", { class: "pair" }, shown.sources ? picture("source.jpg", "source") : null, shown.preview ? picture("preview.png", "preview") : null);
  const words = [size(one.bucket_hw), one.split === "eval" ? "held out" : null].filter(Boolean).join(" · ");
  const button = el("button", { type: "button", class: "card sample" }, pictures, el("span", { class: "caption" }, one.captions[0] ?? "no caption"), el("small", {}, words));
  button.addEventListener("click", () => open(one, pictures));
  return button;
}

export function closer(one, pictures) {
  return [
    pictures.cloneNode(true),
    ...one.captions.map((caption) => el("p", { class: "caption" }, caption)),
    one.more_captions ? el("p", { class: "note" }, `and ${one.more_captions} more captions`) : null,
    facts([
      ["Picture", `${size(one.original_hw)} px`],
      ["Trained at", `${size(one.bucket_hw)} px`],
      ["Cut at", `${one.crop_top_left[0]} from the top, ${one.crop_top_left[1]} from the left`],
      ["Crops", whole(one.crops)],
      ["Data set", one.dataset],
      ["Part", one.split === "eval" ? "held out" : "trained on"],
      ["Id", one.id],
    ]),
  ];
}

export function drawnRow(evaluation, row) {
  const picture = ({ who, picture: at }) =>
    el("figure", {}, el("img", { src: `/picture/evaluation/${evaluation.id}/${evaluation.round}/${at}.jpg`, alt: who, loading: "lazy" }), el("figcaption", {}, who));
  return el("div", { class: "card drawn" }, el("p", { class: "caption" }, row.text || "no caption"), el("div", { class: "side" }, ...row.pictures.map(picture)));
}

export function manifestLine(one, uses) {
  const users = uses.filter((run) => run.manifest?.digest === one.digest).map((run) => run.name);
  return el(
    "li",
    {},
    el("b", {}, one.name),
    el("code", {}, one.digest.slice(0, 12)),
    el("span", {}, several(one.rows, "picture", "pictures")),
    el("time", {}, one.sealed_at ? clock(Date.parse(one.sealed_at) / 1000) : ""),
    one.is_current ? el("span", { class: "state finished" }, "newest") : null,
    users.length ? el("span", { class: "note" }, `used by ${users.join(", ")}`) : null,
  );
}

export function asideLine({ path, reason }) {
  return el("li", {}, el("code", {}, path), el("span", {}, reason));
}

export function eventLine(event, colours) {
  const who = el("span", { class: `who ${colours.get(event.who) ?? ""}` }, event.who);
  return el("li", event.is_alarm ? { class: "alarm" } : {}, el("time", {}, clock(event.time_s)), who, el("span", {}, event.text));
}
