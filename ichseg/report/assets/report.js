// Sorting, filtering, paging, the theme, and keys. The page is whole without it.
(function () {
  "use strict";

  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
  const one = (selector, root) => (root || document).querySelector(selector);
  const body = one("#table tbody");
  const cards = one("#cards");
  const step = Number(cards.dataset.step);
  const cardOf = new Map(all(".card", cards).map((card) => [card.dataset.name, card]));
  const cardWith = new Map(all(".card[data-slug]", cards).map((card) => [card.dataset.slug, card]));
  const viewer = window.ichsegViewer;
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
    const opener = event.target.closest(".open, .panel, .dot[data-slug], [data-open], [data-mm]");
    const holder = opener?.closest("[data-slug]");
    if (!holder || opener.closest("#viewer")) return;
    const { slice, mm } = opener.dataset;
    viewer.open(holder.dataset.slug, slice || mm ? { slice, mm } : undefined);
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

  // ---- keys ----

  // Before the viewer's own keys, and not while someone types or chooses.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input:not([type=range]), select, #opacity") && event.key !== "Escape") return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (viewer.isOpen()) {
      if (!viewer.takeKey(key)) return;
    } else if (key === "j" || key === "k") {
      walk(key === "j" ? 1 : -1);
    } else if (key === "Enter" && one(".card.now[data-slug]") && event.target === document.body) {
      viewer.open(one(".card.now").dataset.slug);
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

  viewer.begin({ cardOf: (slug) => cardWith.get(slug), slugs: listed });
  update();
}());
