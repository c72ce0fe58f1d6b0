// What is seen of the page, and what the keys do.
"use strict";

const at = (id) => document.getElementById(id);
const controls = ["search", "sort", "source", "only", "from", "to", "unit"];
let found = everything, page = 0, chosen = -1;

function made(kind, classes = "", text = "") {
  const element = document.createElement(kind);
  if (classes) element.className = classes;
  if (text) element.textContent = text;
  return element;
}

function colour(element, side) {
  if (!side || side.delta === null) return element.classList.add("plain");
  if (typeof side.delta === "string") return element.classList.add("not-finite");
  const strength = Math.min(Math.abs(side.delta) / 100 / STRONGEST, 1);
  element.style.background = `rgba(var(--${side.delta > 0 ? "for" : "against"}), calc(var(--strength) * ${strength.toFixed(3)}))`;
  element.classList.toggle("against", side.delta < -100);
}

function told(token, side) {
  const words = token.name !== undefined && !token.text ? token.name : token.text;
  const what = `“${visible(words.trim() || words)}”`;
  if (!side || side.delta === null) return `${what}\nno image before it`;
  const parts = token.parts?.length ?? 1, some = side.count ? `${side.count} of ` : "";
  const mean = parts > 1 ? ` (mean of ${some}${parts} tokens)` : "";
  const both = [side.logit, side.delta].every(Number.isFinite) ? signed(side.logit - side.delta) : "not finite";
  const weight = Number.isFinite(side.weight) ? (side.weight / 100).toFixed(2) : signed(side.weight);
  return `${what}${mean}\nΔ ${signed(side.delta)} logits\nlogit ${signed(side.logit)} with, ${both} without\nweight ${weight}`;
}

function answer(tokens, which, letter) {
  const line = made("p", "answer");
  if (letter) line.append(made("b", "letter side", letter));
  let first = true;
  for (const token of tokens) {
    if (!token.text && token.name === undefined) continue;
    const named = !token.text;
    if (named && token.sides[which]?.delta === null) continue;
    const span = made("bdi", named ? "t name" : "t", visible(named ? token.name : token.text).replaceAll("\n", "↵\n"));
    span.tabIndex = first ? 0 : -1;
    first = false;
    colour(span, token.sides[which]);
    span.tip = told(token, token.sides[which]);
    span.setAttribute("aria-label", span.tip.replaceAll("\n", ", "));
    line.append(span);
  }
  return line;
}

function card(number) {
  const record = made("article", "record");
  record.dataset.number = number;
  record.tabIndex = -1;
  const images = made("div", "images");
  for (const source of imagesOf(number)) {
    const image = made("img");
    image.src = source;
    image.alt = `image of record ${index.id[number]}`;
    images.append(image);
  }
  if (!images.childNodes.length) images.append(made("span", "", lostImages[number] ?? (hasImage(number) ? "image not in this page" : "no image")));
  const text = made("div"), head = made("div", "head");
  head.append(made("b", "", visible(index.id[number])), made("span", "", `row ${index.row[number]} of ${visible(index.source[number])}`));
  const figures = (suffix, letter) => {
    if (index.mean[number] === null || index[`mean${suffix}`][number] === null) return;
    const share = Math.round(100 * index[`against${suffix}`][number]);
    head.append(made("span", "", `${letter}mean Δ ${signed(100 * index[`mean${suffix}`][number])}, lowest ${signed(100 * index[`least${suffix}`][number])}, ${share} % against`));
  };
  figures("", settings.compared ? "A " : "");
  if (settings.compared) figures("2", "B ");
  const strange = settings.notFinite[number];
  if (strange) head.append(made("span", "", `${strange} ${strange === 1 ? "token" : "tokens"} with numbers that are not finite`));
  text.append(head);
  const tokens = tokensOf(number), shown = at("unit").value === "word" ? asWords(tokens, number) : tokens;
  index.answers[number].forEach((_, turn) => {
    const question = index.questions[number][turn];
    if (question) text.append(made("p", "question", visible(question)));
    const own = shown.filter((token) => token.turn === turn);
    text.append(answer(own, 0, settings.compared ? "A" : ""));
    if (settings.compared) text.append(answer(own, 1, "B"));
  });
  record.append(images, text);
  return record;
}

function show(focus = false) {
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  at("list").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
  at("count").textContent = `${found.length.toLocaleString("en")} of ${count.toLocaleString("en")} records`;
  at("page").textContent = `page ${page + 1} of ${pages}`;
  at("previous").disabled = page === 0;
  at("next").disabled = page === pages - 1;
  chosen = -1;
  if (focus) at("records").scrollIntoView();
}

function query() {
  return Object.fromEntries(controls.map((name) => [name, at(name).value]));
}

function update() {
  found = selected(query());
  page = 0;
  const kept = Object.entries(query()).filter(([name, value]) => value !== "" && value !== at(name).options?.[0].value);
  history.replaceState(null, "", kept.length ? `#${new URLSearchParams(kept)}` : location.pathname + location.search);
  hideTip();
  show();
}

function choose(step) {
  const cards = [...document.querySelectorAll(".record")];
  if (!cards.length) return;
  chosen = Math.min(Math.max(chosen + step, 0), cards.length - 1);
  cards.forEach((one, place) => one.classList.toggle("chosen", place === chosen));
  cards[chosen].focus({ preventScroll: true });
  cards[chosen].scrollIntoView({ block: "nearest" });
}

function moveToken(step) {
  const own = [...(document.activeElement.closest(".record") ?? document).querySelectorAll(".t")];
  const next = own[own.indexOf(document.activeElement) + (document.activeElement.classList.contains("t") ? step : 1)] ?? null;
  next?.focus();
}

function showTip(token) {
  const tip = at("tip"), box = token.getBoundingClientRect();
  tip.textContent = token.tip;
  tip.hidden = false;
  const left = Math.min(Math.max(box.left, 8), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
}

function hideTip() {
  at("tip").hidden = true;
}

function turnTheme() {
  document.documentElement.classList.toggle("dark");
}

function listAgainst(entries, list) {
  for (const [number, token, delta] of entries) {
    const own = tokensOf(number)[token], item = made("li"), button = made("button", "word");
    button.type = "button";
    button.append(made("bdi", "", visible(own.text.trim() || own.name || "·")), " ", made("small", "", `${signed(100 * delta)} in ${visible(index.id[number])}`));
    button.onclick = () => searchFor(index.id[number]);
    item.append(button);
    list.append(item);
  }
  if (!entries.length) list.append(made("li", "soft", "none below −1"));
}

// What the address asks for. A choice that this page lacks (it may be of another page) leaves the control as it is
function restore(hash) {
  for (const [name, value] of new URLSearchParams(hash.slice(1))) {
    if (!controls.includes(name)) continue;
    const { options } = at(name);
    if (!options || [...options].some((option) => option.value === value)) at(name).value = value;
  }
}

function begin() {
  if (matchMedia("(prefers-color-scheme: dark)").matches) turnTheme();
  for (const source of [...new Set(index.source)]) {
    const option = made("option", "", visible(source));
    option.value = source;
    at("source").append(option);
  }
  settings.against.forEach((entries, side) => listAgainst(entries, document.querySelectorAll(".against-list")[side]));
  restore(location.hash);
  for (const name of controls) at(name).addEventListener("input", update);
  at("controls").onsubmit = (event) => event.preventDefault();
  at("previous").onclick = () => { page -= 1; show(true); };
  at("next").onclick = () => { page += 1; show(true); };
  at("theme").onclick = turnTheme;
  for (const word of document.querySelectorAll("[data-word]")) word.onclick = () => searchFor(word.dataset.word);
  for (const [event, act] of [["mouseover", showTip], ["focusin", showTip], ["mouseout", hideTip], ["focusout", hideTip]])
    at("list").addEventListener(event, ({ target }) => target.classList.contains("t") && act(target));
  document.addEventListener("keydown", keys);
  update();
}

function searchFor(words) {
  at("search").value = words;
  update();
  at("records").scrollIntoView();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { document.activeElement.blur(); hideTip(); return; }
  if (["INPUT", "SELECT"].includes(document.activeElement.tagName)) return;
  const act = {
    "/": () => at("search").focus(), j: () => choose(1), k: () => choose(-1), n: () => at("next").click(), p: () => at("previous").click(),
    w: () => { at("unit").value = at("unit").value === "word" ? "token" : "word"; update(); }, d: turnTheme,
    ArrowRight: () => moveToken(1), ArrowLeft: () => moveToken(-1),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
}

begin();
