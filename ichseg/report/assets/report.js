// Sorting, filtering, paging, the theme, and the viewer. The page is whole without it.
(function () {
  "use strict";

  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
  const one = (selector, root) => (root || document).querySelector(selector);
  const body = one("#table tbody");
  const cards = one("#cards");
  const step = Number(cards.dataset.step);
  const cardOf = new Map(all(".card", cards).map((card) => [card.dataset.name, card]));
  const cardWith = new Map(all(".card[data-slug]", cards).map((card) => [card.dataset.slug, card]));
  let visible = step;

  // ---- table and cards ----

  function matching() {
    const words = one("#filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const flags = all(".chip[aria-pressed=true]").map((chip) => chip.dataset.flag);
    return (row) => {
      const text = row.textContent.toLowerCase();
      const own = all(".flag", cardOf.get(row.dataset.name)).map((flag) => flag.textContent);
      const has = row.dataset.flags + " " + own.join(" ");
      return words.every((word) => text.includes(word)) && flags.every((flag) => has.includes(flag));
    };
  }

  // Cards follow the table: its order, and what the filter leaves.
  function update() {
    const matches = matching();
    const names = new Set();
    for (const row of body.rows) {
      row.hidden = !matches(row);
      if (!row.hidden) names.add(row.dataset.name);
    }
    let count = 0;
    const rest = all(".card", cards).filter((card) => !names.has(card.dataset.name));
    for (const name of names) {
      const card = cardOf.get(name);
      if (!card) continue;
      card.hidden = count++ >= visible;
      cards.append(card);
    }
    for (const card of rest) {
      card.hidden = true;
      cards.append(card);
    }
    const total = cardOf.size;
    one("#count").textContent = names.size === total ? `${total} cases` : `${names.size} of ${total} cases`;
    one("#more").hidden = names.size <= visible;
    one("#more").textContent = `Show more pictures (${Math.min(visible, names.size)} of ${names.size} shown)`;
  }

  function sort(heading) {
    const column = heading.cellIndex;
    const numeric = heading.classList.contains("number");
    const up = heading.getAttribute("aria-sort") !== "ascending";
    all("#table thead th").forEach((th) => th.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = Array.from(body.rows, (row) => [row.cells[column].dataset.value, row]);
    keyed.sort(([a], [b]) => {
      if (numeric && (a === "" || b === "")) return (a === "") - (b === ""); // unknown ones last
      const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
      return up ? order : -order;
    });
    body.append(...keyed.map(([, row]) => row));
    update();
  }

  function listed() {
    const seen = new Set();
    for (const row of body.rows) if (!row.hidden && row.dataset.slug) seen.add(row.dataset.slug);
    return Array.from(seen);
  }

  all("#table thead th").forEach((th) => one("button", th).addEventListener("click", () => sort(th)));
  one("#filter").addEventListener("input", () => { visible = step; update(); });
  all(".chip").forEach((chip) => chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    visible = step;
    update();
  }));
  one("#more").addEventListener("click", () => { visible += 2 * step; update(); });

  document.addEventListener("click", (event) => {
    const place = event.target.closest(".open, .panel, .dot[data-slug], [data-open]");
    if (!place || event.target.closest("#viewer")) return;
    const holder = place.closest("[data-slug]");
    if (holder) open(holder.dataset.slug, place.dataset.slice);
  });

  // ---- theme and print ----

  const themes = ["system", "light", "dark"];
  function setTheme(name) {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    one("#theme").textContent = `Theme: ${name}`;
    try { localStorage.setItem("ichseg-theme", name); } catch (error) { /* not from file:// everywhere */ }
  }
  let theme = "system";
  try { theme = localStorage.getItem("ichseg-theme") || theme; } catch (error) { /* as above */ }
  setTheme(themes.includes(theme) ? theme : "system");
  one("#theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
  });
  one("#print").addEventListener("click", () => window.print());

  // ---- viewer ----

  const viewer = one("#viewer");
  const slider = one("#slice");
  const waiting = new Map(); // slug: what takes the volumes
  const kept = new Map(); // the last cases' volumes, by slug
  const KEPT = 3;
  const PALETTES = {
    prediction: [[230, 159, 0], [213, 94, 0], [240, 228, 66]],
    reference: [[86, 180, 233], [0, 158, 115], [0, 114, 178]],
  };
  const state = { slug: null, window: null, view: "axial", outline: true, off: new Set() };
  let nv = null;
  let opening = 0;

  // Called by a case's script.
  window.ichsegCase = (slug, volumes) => { waiting.get(slug)?.(volumes); };

  function run(source) {
    return new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = source;
      script.onload = () => { script.remove(); done(); };
      script.onerror = () => { script.remove(); failed(new Error(`${source} cannot be loaded`)); };
      document.head.append(script);
    });
  }

  async function volumesOf(slug) {
    if (!kept.has(slug)) {
      let found = null;
      waiting.set(slug, (volumes) => { found = volumes; });
      await run(`cases/${slug}.js`);
      waiting.delete(slug);
      if (!found) throw new Error(`cases/${slug}.js holds another case`);
      kept.set(slug, found);
      for (const old of kept.keys()) if (kept.size > KEPT) kept.delete(old);
    }
    return kept.get(slug);
  }

  async function start() {
    if (nv) return;
    if (!window.niivue) await run("assets/niivue.umd.js");
    const made = new window.niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 1, 1, 0.35],
      crosshairWidth: 0.6,
      isRadiologicalConvention: true,
      isNearestInterpolation: false,
      isOrientCube: false,
      isColorbar: false,
      loadingText: "",
      logLevel: "error",
      multiplanarShowRender: window.niivue.SHOW_RENDER ? window.niivue.SHOW_RENDER.ALWAYS : 1,
      dragMode: window.niivue.DRAG_MODE ? window.niivue.DRAG_MODE.pan : 3,
    });
    await made.attachToCanvas(one("#canvas"));
    for (const [name, colours] of Object.entries(PALETTES)) {
      const parts = [0, 1, 2].map((part) => [0, ...colours.map((colour) => colour[part])]);
      made.addColormap(name, { R: parts[0], G: parts[1], B: parts[2], A: [0, 255, 255, 255], I: [0, 85, 170, 255] });
    }
    made.onLocationChange = showSlice;
    nv = made;
  }

  async function open(slug, at) {
    const mine = ++opening;
    const card = cardWith.get(slug);
    if (!card) return;
    if (!viewer.open) viewer.showModal();
    one("#canvas").focus();
    state.slug = slug;
    one("#viewer-name").textContent = card.dataset.name;
    one("#viewer-facts").textContent = all(".figures div", card)
      .map((figure) => `${one("dt", figure).textContent} ${one("dd", figure).textContent}`).join(" · ");
    say("Loading …");
    try {
      await start();
      const volumes = await volumesOf(slug);
      if (mine !== opening) return;
      await show(card, volumes, at);
      if (mine !== opening) return;
      viewer.dataset.shown = slug;
      say(merged(card));
    } catch (error) {
      if (mine === opening) say(`The viewer cannot show this case: ${error.message || error}`);
    }
  }

  async function show(card, volumes, at) {
    const isCt = card.dataset.ct === "1";
    one(".windows").hidden = !isCt;
    const [width, level] = (isCt && state.window ? state.window : card.dataset.window).split(" ").map(Number);
    const options = [{ base64: volumes.image, name: "image.nii.gz", colormap: "gray", opacity: 1, cal_min: level - width / 2, cal_max: level + width / 2 }];
    // The reference last: its dashes lie on what was found.
    const names = ["prediction", "reference"].filter((name) => name in volumes);
    for (const name of names) options.push({ base64: volumes[name], name: `${name}.nii.gz`, colormap: name, opacity: 1, cal_min: 0, cal_max: 3 });
    const images = await Promise.all(options.map((option) => window.niivue.NVImage.loadFromBase64(option)));
    while (nv.volumes.length) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
    images.forEach((image, i) => {
      Object.assign(image, { colormap: options[i].colormap, cal_min: options[i].cal_min, cal_max: options[i].cal_max, opacity: options[i].opacity });
      if (i) image.styles = { fill: image.img, outline: outlineOf(image, i > 1 && images[i - 1].styles.outline) };
      nv.addVolume(image);
    });
    state.names = names;
    state.first = Number(card.dataset.first);
    state.merged = Number(card.dataset.merged.split(" ")[0]);
    slider.max = depth() - 1;
    const slice = at === undefined ? Number(card.dataset.start) : Number(at);
    nv.scene.crosshairPos = middleOf(images.slice(1).reverse(), Math.floor((slice - state.first) / state.merged));
    press();
    goTo(Math.floor((slice - state.first) / state.merged));
  }

  // The voxels around each label within its slice, as in the pictures; of the reference, where it
  // coincides with what was found, every other piece, so that both show.
  function outlineOf(image, below) {
    const [, width, height, slices] = image.hdr.dims;
    const labels = image.img;
    const ring = new labels.constructor(labels.length);
    for (let at = 0, z = 0; z < slices; z++) {
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++, at++) {
          const label = labels[at];
          if (!label) continue;
          for (let dy = -1; dy <= 1; dy++) {
            for (let dx = -1; dx <= 1; dx++) {
              if (x + dx < 0 || x + dx >= width || y + dy < 0 || y + dy >= height) continue;
              const near = at + dy * width + dx;
              const gap = below && below[near] && ((2 * (x + dx) + y + dy) >> 3) % 2;
              if (labels[near] !== label && !gap) ring[near] = label;
            }
          }
        }
      }
    }
    return ring;
  }

  const depth = () => nv.volumes[0].dimsRAS[3];
  const now = () => Math.min(depth() - 1, Math.max(0, Math.floor(nv.scene.crosshairPos[2] * depth())));

  // Where a mask lies in this slice, as the viewer counts: from the right, the back and the feet.
  // The files' axes run to the left, to the back and up.
  function middleOf(images, slice) {
    for (const image of images) {
      const [, width, height] = image.hdr.dims;
      let count = 0, sumX = 0, sumY = 0;
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          if (image.styles.fill[(slice * height + y) * width + x]) { count++; sumX += x + 0.5; sumY += y + 0.5; }
        }
      }
      if (count) return [1 - sumX / count / width, 1 - sumY / count / height, 0.5];
    }
    return [0.5, 0.5, 0.5];
  }

  function goTo(slice) {
    const z = Math.min(depth() - 1, Math.max(0, slice));
    nv.scene.crosshairPos[2] = (z + 0.5) / depth();
    nv.drawScene();
    nv.createOnLocationChange();
    showSlice();
  }

  function showSlice() {
    const at = now();
    slider.value = at;
    const high = state.first + at * state.merged;
    const card = cardWith.get(state.slug);
    const lowest = state.merged > 1 ? `${high}..${high + state.merged - 1}` : high;
    one("#slice-number").textContent = `Slice ${lowest}`;
    if (card) slider.setAttribute("aria-valuetext", `slice ${lowest}`);
  }

  function merged(card) {
    const [z, y, x] = card.dataset.merged.split(" ").map(Number);
    return z * y * x > 1 ? `Shown coarser: ${z} × ${y} × ${x} voxels as one` : "";
  }

  // Brings viewer and buttons to what the state says.
  function press() {
    const card = cardWith.get(state.slug);
    const window_ = state.window || card.dataset.window;
    const [width, level] = window_.split(" ").map(Number);
    if (card.dataset.ct === "1") {
      nv.volumes[0].cal_min = level - width / 2;
      nv.volumes[0].cal_max = level + width / 2;
    }
    const outline = state.outline && state.view === "axial";
    state.names.forEach((name, i) => {
      const image = nv.volumes[i + 1];
      image.img = image.styles[outline ? "outline" : "fill"];
      image.opacity = state.off.has(name) ? 0 : outline ? 1 : 0.45;
    });
    const types = { axial: nv.sliceTypeAxial, planes: nv.sliceTypeMultiplanar, render: nv.sliceTypeRender };
    nv.opts.multiplanarLayout = one(".stage").clientWidth > one(".stage").clientHeight ? 2 : 0; // grid, or what fits
    nv.volumes[0].opacity = state.view === "render" ? 0.25 : 1; // to see into the head
    nv.opts.crosshairWidth = state.view === "axial" ? 0 : 0.6;
    nv.setSliceType(types[state.view]);
    nv.updateGLVolume();
    const pressed = (button, is) => button.setAttribute("aria-pressed", String(is));
    all("[data-window]", viewer).forEach((b) => pressed(b, b.dataset.window === window_));
    all("[data-mask]", viewer).forEach((b) => {
      b.hidden = !state.names.includes(b.dataset.mask);
      pressed(b, !state.off.has(b.dataset.mask));
    });
    all("[data-view]", viewer).forEach((b) => pressed(b, b.dataset.view === state.view));
    pressed(one("#outline"), state.outline);
    one("#outline").disabled = state.view !== "axial";
  }

  function choose(button) {
    const { window: window_, mask, view } = button.dataset;
    if (window_) state.window = window_;
    if (view) state.view = view;
    if (mask && !state.off.delete(mask)) state.off.add(mask);
    if (button.id === "outline") state.outline = !state.outline;
    if (nv && nv.volumes.length) press();
  }

  function move(by) {
    const slugs = listed();
    const at = slugs.indexOf(state.slug) + by;
    if (slugs[at]) open(slugs[at]);
  }

  function say(text) { one("#viewer-message").textContent = text; }

  slider.addEventListener("input", () => goTo(Number(slider.value)));
  one("#close").addEventListener("click", () => viewer.close());
  one("#previous").addEventListener("click", () => move(-1));
  one("#next").addEventListener("click", () => move(1));
  all(".group button", viewer).forEach((button) => button.addEventListener("click", () => choose(button)));
  viewer.addEventListener("close", () => {
    if (viewer.open) return; // the event comes late: another case may be open already
    opening++;
    const card = cardWith.get(state.slug);
    all(".now").forEach((element) => element.classList.remove("now"));
    card.classList.add("now");
    if (!card.hidden) card.scrollIntoView({ block: "nearest" });
  });

  const KEYS = { 1: '[data-window="80 40"]', 2: '[data-window="200 80"]', 3: '[data-window="2500 480"]', r: '[data-mask="reference"]', p: '[data-mask="prediction"]', o: "#outline", a: '[data-view="axial"]', m: '[data-view="planes"]', d: '[data-view="render"]' };
  // Before the viewer's own keys, and not while someone types.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("#filter")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (viewer.open) {
      const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 };
      const button = KEYS[key] && one(KEYS[key], viewer);
      if (key in steps && nv && nv.volumes.length) goTo(now() + steps[key]);
      else if (key === "j" || key === "k") move(key === "j" ? 1 : -1);
      else if (key === "Escape") viewer.close();
      else if (button && !button.hidden) choose(button);
      else return;
    } else if (key === "j" || key === "k") {
      walk(key === "j" ? 1 : -1);
    } else if (key === "Enter" && one(".card.now[data-slug]") && event.target === document.body) {
      open(one(".card.now").dataset.slug);
    } else if (key === "/") {
      one("#filter").focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }, true);

  function walk(by) {
    const shown = all(".card:not([hidden])", cards);
    const at = shown.indexOf(one(".card.now", cards));
    const next = shown[at < 0 ? 0 : at + by];
    if (!next) return;
    all(".now").forEach((element) => element.classList.remove("now"));
    next.classList.add("now");
    next.scrollIntoView({ block: "start" });
  }

  // The wheel scrolls through slices in every view but the turning one.
  one("#canvas").addEventListener("wheel", (event) => {
    if (state.view !== "axial" || !nv || !nv.volumes.length) return;
    event.preventDefault();
    event.stopPropagation();
    goTo(now() + (event.deltaY < 0 ? 1 : -1));
  }, { capture: true, passive: false });

  update();
}());
