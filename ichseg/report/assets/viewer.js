// The viewer: a dialog in which a case is opened, scrolled through, windowed and measured.
(function () {
  "use strict";

  const { makePane, fill, adjust, follow, look, fromMm, middleOf, measure, picture } = window.ichsegPane;
  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
  const one = (selector, root) => (root || document).querySelector(selector);
  const viewer = one("#viewer");
  const slider = one("#slice");
  const waiting = new Map(); // slug: what takes the volumes
  const kept = new Map(); // the last cases' volumes, by slug
  const KEPT = 3;
  const HALF = 300; // pixels of dragging that double the width of the window
  const AT_FIRST = () => ({ window: null, view: "axial", tool: "look", outline: true, outlined: 1, filled: 0.45, off: new Set() });
  const state = { slug: null, ...AT_FIRST() };
  const panes = []; // the second shows another scan of the patient beside the first
  let opening = 0;
  let following = false;
  let list = null; // { cardOf(slug), slugs() }: the page's cases

  // ---- opening ----

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

  const main = () => panes[0];
  const isReady = () => Boolean(main()?.nv.volumes.length);
  const shown = () => panes.filter(({ element }) => !element.hidden);

  // Sees to so many panes; they move together.
  async function start(count) {
    if (!window.niivue) await run("assets/niivue.umd.js");
    for (const [i, element] of all(".pane").entries()) {
      element.hidden = i >= count;
      if (element.hidden || panes[i]) continue;
      const pane = await makePane(element);
      panes[i] = pane;
      pane.drawn = () => {
        if (following || !pane.nv.volumes.length) return;
        following = true;
        shown().filter((other) => other !== pane && other.nv.volumes.length).forEach((other) => follow(pane, other));
        following = false;
        if (isReady()) showSlice();
      };
    }
  }

  // `place` is {slice} or {mm}; without it, the slice with most of the masks.
  async function open(slug, place) {
    const mine = ++opening;
    const card = list.cardOf(slug);
    if (!card) return;
    if (!viewer.open) viewer.showModal();
    state.slug = slug;
    delete viewer.dataset.shown;
    const slugs = card.dataset.pair ? card.dataset.pair.split(" ") : [slug];
    const cards = slugs.map((each) => list.cardOf(each));
    one("#viewer-name").textContent = cards.map(({ dataset }) => dataset.name).join(", ");
    one("#viewer-facts").textContent = cards.map(factsOf).join(" → ");
    one("#viewer-facts").title = one("#viewer-facts").textContent; // where it is cut off
    one("#under").textContent = "";
    listLesions(slugs[0]);
    say("Loading …");
    try {
      await start(slugs.length);
      main().canvas.focus();
      if (card.dataset.ct !== "1") state.window = null; // another scan's unit
      for (const [i, each] of slugs.entries()) {
        const volumes = await volumesOf(each);
        if (mine !== opening) return;
        await fill(panes[i], volumes, chosenWindow());
        if (mine !== opening) return;
        one(".pane-name", panes[i].element).textContent = slugs.length > 1 ? cards[i].dataset.name : "";
      }
      state.first = Number(card.dataset.first);
      state.slices = Number(card.dataset.slices);
      state.merged = Number(card.dataset.merged.split(" ")[0]);
      slider.max = depth() - 1;
      press();
      goToPlace(place || { slice: card.dataset.start });
      viewer.dataset.shown = slug;
      say(merged(card));
    } catch (error) {
      if (mine === opening) say(`The viewer cannot show this case: ${error.message || error}`);
    }
  }

  const factsOf = (card) => all(".figures div", card)
    .map((figure) => `${one("dt", figure).textContent} ${one("dd", figure).textContent}`).join(" · ");

  function merged(card) {
    const [z, y, x] = card.dataset.merged.split(" ").map(Number);
    return z * y * x > 1 ? `Shown coarser: ${z} × ${y} × ${x} voxels as one` : "";
  }

  function say(text) { one("#viewer-message").textContent = text; }

  // The lesions of the case's table, to go to.
  function listLesions(slug) {
    const lesions = all(`[data-slug="${CSS.escape(slug)}"] [data-mm]`);
    const select = one("#lesion");
    select.replaceChildren(new Option("Lesions", ""), ...lesions.map((lesion) => new Option(lesion.title, lesion.dataset.mm)));
    select.hidden = lesions.length === 0;
  }

  // ---- where ----

  const depth = () => main().nv.volumes[0].dimsRAS[3];
  const now = () => Math.min(depth() - 1, Math.max(0, Math.floor(main().nv.scene.crosshairPos[2] * depth())));

  function goToPlace({ slice, mm }) {
    if (mm) {
      main().nv.scene.crosshairPos = fromMm(main(), mm.split(" ").map(Number));
      goTo(now());
    } else {
      const z = Math.floor((Number(slice) - state.first) / state.merged);
      main().nv.scene.crosshairPos = middleOf(main(), z);
      goTo(z);
    }
  }

  function goTo(slice) {
    const z = Math.min(depth() - 1, Math.max(0, slice));
    main().nv.scene.crosshairPos[2] = (z + 0.5) / depth();
    main().nv.drawScene();
  }

  // Slices are counted from 1, the lowest.
  function showSlice() {
    slider.value = now();
    const low = state.first + now() * state.merged + 1;
    const high = Math.min(low + state.merged - 1, state.slices);
    const text = low === high ? `Slice ${low} of ${state.slices}` : `Slices ${low} to ${high} of ${state.slices}`;
    one("#slice-number").textContent = text;
    slider.setAttribute("aria-valuetext", text);
  }

  function move(by) {
    const slugs = list.slugs();
    const slug = slugs[slugs.indexOf(state.slug) + by];
    if (slug) open(slug);
  }

  function nextLesion(by) {
    const select = one("#lesion");
    const count = select.options.length - 1;
    if (count < 1) return;
    const at = select.selectedIndex; // 0 is none
    select.selectedIndex = at + by < 1 ? count : at + by > count ? 1 : at + by;
    goToPlace({ mm: select.value });
  }

  // ---- how ----

  const chosenWindow = () => state.window || list.cardOf(state.slug).dataset.window.split(" ").map(Number);
  const style = () => (state.outline && state.view !== "render" ? "outlined" : "filled");

  // Brings pictures and buttons to what the state says.
  function press() {
    const isCt = list.cardOf(state.slug).dataset.ct === "1";
    const window_ = chosenWindow();
    shown().forEach((pane) => adjust(pane, { ...state, window: window_, opacity: state[style()] }));
    const pressed = (button, is) => button.setAttribute("aria-pressed", String(is));
    all("[data-window]", viewer).forEach((button) => {
      button.hidden = !isCt;
      pressed(button, button.dataset.window === window_.join(" "));
    });
    [one("#width").value, one("#level").value] = window_.map((value) => Number(value.toPrecision(4)));
    all("[data-mask]", viewer).forEach((button) => {
      button.hidden = !main().masks.some(({ name }) => name === button.dataset.mask);
      pressed(button, !state.off.has(button.dataset.mask));
    });
    all("[data-view]", viewer).forEach((button) => pressed(button, button.dataset.view === state.view));
    all("[data-tool]", viewer).forEach((button) => pressed(button, button.dataset.tool === state.tool));
    pressed(one("#outline"), state.outline);
    one("#outline").disabled = state.view === "render";
    one("#opacity").value = state[style()];
    shown().forEach(({ above }) => above.classList.toggle("takes", state.tool !== "look"));
    one("#mask").href = `cases/${state.slug}_prediction.nii.gz`;
    one("#mask").hidden = !main().masks.some(({ name }) => name === "prediction");
  }

  function choose(button) {
    const { window: window_, mask, view, tool } = button.dataset;
    if (window_) state.window = window_.split(" ").map(Number);
    if (view) state.view = view;
    if (tool) state.tool = tool;
    if (mask && !state.off.delete(mask)) state.off.add(mask);
    if (button.id === "outline") state.outline = !state.outline;
    if (button.id === "reset") reset();
    if (button.id === "picture") savePicture();
    if (isReady()) press();
  }

  // As the viewer was at first: window, zoom, masks and view; no lines of the ruler.
  function reset() {
    Object.assign(state, AT_FIRST());
    one("#lesion").selectedIndex = 0;
    shown().forEach((pane) => pane.nv.clearMeasurements());
    const { nv } = main();
    nv.setPan2Dxyzmm([0, 0, 0, 1]);
    nv.scene.volScaleMultiplier = 1;
    nv.setRenderAzimuthElevation(110, 10);
    goToPlace({ slice: list.cardOf(state.slug).dataset.start });
  }

  async function savePicture() {
    const link = document.createElement("a");
    link.download = `${state.slug}_slice_${state.first + now() * state.merged + 1}.png`;
    link.href = URL.createObjectURL(await picture(shown()));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000); // it may ask where to
  }

  // ---- mouse and touch ----

  const paneAt = (event) => panes.find(({ element }) => element.contains(event.target));
  const PLACES = { prediction: "found", reference: "reference" };
  function showUnder(event) {
    if (state.tool === "ruler" && event.buttons) return; // the length stands there
    const pane = paneAt(event);
    const under = pane && look(pane, event);
    const unit = list.cardOf(state.slug)?.dataset.ct === "1" ? " HU" : "";
    one("#under").textContent = !under ? "" : [
      `${Number(under.value.toPrecision(4))}${unit}`,
      `${under.mm.map((value) => value.toFixed(1)).join(", ")} mm LPS`,
      ...under.masks.map((name) => PLACES[name]),
    ].join(" · ").replaceAll("-", "−");
  }

  // With the tools, dragging on the scan changes the window or draws a line.
  function drag(down) {
    if (down.button !== 0 || !isReady()) return;
    const pane = paneAt(down);
    const target = down.currentTarget;
    const [width, level] = chosenWindow();
    const least = list.cardOf(state.slug).dataset.ct === "1" ? 1 : 1e-6;
    let drawn = false;
    const on = (event) => {
      if (state.tool === "ruler") {
        const length = measure(pane, down, event, drawn);
        drawn = length !== null;
        one("#under").textContent = drawn ? `${length.toFixed(1)} mm` : "";
      } else {
        const step = width / HALF;
        state.window = [Math.max(least, width + (event.clientX - down.clientX) * step), level + (down.clientY - event.clientY) * step]
          .map((value) => (least === 1 ? Math.round(value) : value));
        press();
      }
    };
    const end = () => {
      target.removeEventListener("pointermove", on);
      target.removeEventListener("pointerup", end);
      target.removeEventListener("pointercancel", end);
    };
    target.setPointerCapture(down.pointerId);
    target.addEventListener("pointermove", on);
    target.addEventListener("pointerup", end);
    target.addEventListener("pointercancel", end);
    down.preventDefault();
  }

  one(".stage").addEventListener("pointermove", showUnder);
  one(".stage").addEventListener("pointerdown", showUnder);
  one(".stage").addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") one("#under").textContent = ""; // a finger leaves with each touch
  });
  all(".stage .above").forEach((above) => above.addEventListener("pointerdown", drag));
  // The wheel scrolls through slices in every view but the turning one; with Ctrl it zooms.
  one(".stage").addEventListener("wheel", (event) => {
    if (!isReady()) return;
    if (event.ctrlKey) {
      event.preventDefault();
      event.stopPropagation();
      zoom(event.deltaY < 0 ? 1.25 : 0.8);
    } else if (state.view === "axial") {
      event.preventDefault();
      event.stopPropagation();
      goTo(now() + (event.deltaY < 0 ? 1 : -1));
    }
  }, { capture: true, passive: false });

  // Zooms around the crosshair.
  function zoom(factor) {
    const { nv } = main();
    const before = nv.scene.pan2Dxyzmm[3];
    const after = Math.min(10, Math.max(1, before * factor));
    const mm = nv.frac2mm(nv.scene.crosshairPos);
    const pan = [0, 1, 2].map((axis) => nv.scene.pan2Dxyzmm[axis] + (before - after) * mm[axis]);
    nv.setPan2Dxyzmm(after === 1 ? [0, 0, 0, 1] : [...pan, after]);
  }

  // ---- controls and keys ----

  slider.addEventListener("input", () => goTo(Number(slider.value)));
  one("#lesion").addEventListener("change", (event) => {
    if (event.target.value) goToPlace({ mm: event.target.value });
    main().canvas.focus();
  });
  one("#opacity").addEventListener("input", (event) => { state[style()] = Number(event.target.value); press(); });
  one("#opacity").addEventListener("change", () => main().canvas.focus());
  all("#width, #level").forEach((field) => field.addEventListener("change", () => {
    const [width, level] = [one("#width").valueAsNumber, one("#level").valueAsNumber];
    if (width > 0 && Number.isFinite(level)) state.window = [width, level];
    press(); // and what was no number is as before
  }));
  one("#close").addEventListener("click", () => viewer.close());
  one("#previous").addEventListener("click", () => move(-1));
  one("#next").addEventListener("click", () => move(1));
  all(".group button", viewer).forEach((button) => button.addEventListener("click", () => choose(button)));
  viewer.addEventListener("close", () => {
    if (viewer.open) return; // the event comes late: another case may be open already
    opening++;
    const card = list.cardOf(state.slug);
    all(".now").forEach((element) => element.classList.remove("now"));
    card.classList.add("now");
    if (!card.hidden) card.scrollIntoView({ block: "nearest" });
  });

  const BUTTONS = {
    1: '[data-window="80 40"]', 2: '[data-window="200 80"]', 3: '[data-window="2500 480"]',
    r: '[data-mask="reference"]', p: '[data-mask="prediction"]', o: "#outline",
    a: '[data-view="axial"]', m: '[data-view="planes"]', d: '[data-view="render"]',
    v: '[data-tool="look"]', w: '[data-tool="window"]', l: '[data-tool="ruler"]', 0: "#reset", s: "#picture",
  };
  const STEPS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 };

  // Does what a key stands for; whether it stands for anything.
  function takeKey(key) {
    const button = BUTTONS[key] && one(BUTTONS[key], viewer);
    if (key === "Escape") viewer.close();
    else if (key === "j" || key === "k") move(key === "j" ? 1 : -1);
    else if (!isReady()) return false;
    else if (key in STEPS) goTo(now() + STEPS[key]);
    else if (key === "n" || key === "b") nextLesion(key === "n" ? 1 : -1);
    else if (key === "+" || key === "-") zoom(key === "+" ? 1.25 : 0.8);
    else if (button && !button.hidden) choose(button);
    else return false;
    return true;
  }

  window.ichsegViewer = {
    open,
    takeKey,
    isOpen: () => viewer.open,
    begin: (cases) => { list = cases; },
  };
}());
