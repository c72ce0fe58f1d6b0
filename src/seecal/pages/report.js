// Data of the page: the index is read at once, the numbers of tokens when one of their records is looked at.
"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const settings = read("settings"), index = read("index");
const CHUNK = 200, PAGE = 20, STRONGEST = 5;
const count = index.id.length;
const everything = Array.from({ length: count }, (_, number) => number);
const chunks = new Map();
const lostImages = read("lost");
let pictures = null;

function tokensOf(number) {
  const chunk = Math.floor(number / CHUNK);
  if (!chunks.has(chunk)) chunks.set(chunk, read(`chunk-${chunk}`));
  const [turns, lengths, names, inside, ...sides] = chunks.get(chunk)[number % CHUNK];
  const done = {};
  return turns.map((turn, place) => {
    const start = done[turn] ?? 0;
    done[turn] = start + lengths[place];
    const text = index.answers[number][turn].slice(start, done[turn]);
    const side = (first) => sides.length > first && {
      delta: sides[first][place], weight: sides[first + 1][place], logit: sides[first + 2][place],
    };
    return { turn, start, stop: done[turn], text, name: names[place], inside: inside.includes(place), sides: [side(0), side(3)].filter(Boolean) };
  });
}

function imagesOf(number) {
  pictures ??= read("thumbnails");
  return pictures[number] ?? [];
}

// What is searched, folded once; made when somebody searches first
let folded = null;
function searched() {
  folded ??= everything.map((number) =>
    `${index.id[number]}\n${index.questions[number].join("\n")}\n${index.answers[number].join("\n")}`.toLowerCase());
  return folded;
}

const orders = {
  place: () => 0,
  "mean-down": (number) => -(index.mean[number] ?? -Infinity),
  "mean-up": (number) => index.mean[number] ?? Infinity,
  least: (number) => index.least[number] ?? Infinity,
  against: (number) => -(index.against[number] ?? -1),
  long: (number) => -index.answers[number].reduce((sum, text) => sum + text.length, 0),
  gain: (number) => index.mean[number] === null || index.mean2[number] === null ? Infinity : index.mean[number] - index.mean2[number],
  loss: (number) => index.mean[number] === null || index.mean2[number] === null ? Infinity : index.mean2[number] - index.mean[number],
};

const hasImage = (number) => index.mean[number] !== null || number in settings.notFinite;

// The records that a query asks for, in its order. Records with equal keys stay in the data's order.
function selected(query) {
  const words = query.search.toLowerCase().trim(), texts = words ? searched() : null;
  const from = query.from === "" ? -Infinity : Number(query.from), to = query.to === "" ? Infinity : Number(query.to);
  const bounded = query.from !== "" || query.to !== "";
  const only = {
    "": () => true, image: hasImage, text: (number) => !hasImage(number), odd: (number) => number in settings.notFinite,
    against: (number) => index.least[number] !== null && index.least[number] < -1,
  }[query.only];
  const found = everything.filter((number) =>
    (!texts || texts[number].includes(words)) && (query.source === "" || index.source[number] === query.source) &&
    only(number) && (!bounded || (index.mean[number] !== null && index.mean[number] >= from && index.mean[number] <= to)));
  if (query.sort === "place") return found;
  const keys = new Float64Array(count);
  for (const number of found) keys[number] = orders[query.sort](number);
  return found.sort((one, other) => (keys[one] < keys[other] ? -1 : keys[one] > keys[other] ? 1 : one - other));
}

// Control characters, and those that turn the direction of what follows, written out
const invisible = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const visible = (text) => text.replace(invisible, (letter) => `⟨U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const notFinite = { nan: "NaN", inf: "+∞", "-inf": "−∞" };
const signed = (hundredths) => typeof hundredths === "string" ? `not finite (${notFinite[hundredths]})` : (hundredths > 0 ? "+" : hundredths < 0 ? "−" : "") + (Math.abs(hundredths) / 100).toFixed(2);

// Blanks belong to the word that follows, those at the end to the last
function withBlanks(pieces) {
  const found = [];
  let blanks = "";
  for (const piece of pieces) {
    if (!piece.trim()) { blanks += piece; continue; }
    found.push(blanks + piece);
    blanks = "";
  }
  if (blanks) found.push((found.pop() ?? "") + blanks);
  return found;
}

// Tokens together as the words of their answer, a word with the mean of its tokens
function asWords(tokens, number) {
  const segmenter = typeof Intl.Segmenter === "function" ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;
  const pieces = (text) => segmenter ? [...segmenter.segment(text)].map((one) => one.segment) : text.match(/\s+|\S+/g) ?? [];
  const found = [];
  for (const turn of new Set(tokens.map((token) => token.turn))) {
    const own = tokens.filter((token) => token.turn === turn);
    let start = 0;
    for (const text of withBlanks(pieces(index.answers[number][turn]))) {
      const stop = start + text.length;
      // A word's tokens are those of its letters: a token that carries the blanks before it is not of the word before
      const begin = text.trim() ? stop - text.trimStart().length : start, end = text.trim() ? start + text.trimEnd().length : stop;
      const inside = own.filter((token) => token.start - (token.inside ? 1 : 0) < end && token.stop > begin);
      found.push({ turn, start, stop, text, name: undefined, parts: inside, sides: meanOf(inside) });
      start = stop;
    }
    found.push(...own.filter((token) => token.name !== undefined && !token.inside && token.start === index.answers[number][turn].length));
  }
  return found;
}

function meanOf(tokens) {
  if (!tokens.length) return [];
  return tokens[0].sides.map((_, side) => {
    const seen = tokens.map((token) => token.sides[side]).filter((one) => one.delta !== null);
    const finite = seen.filter((one) => [one.delta, one.weight, one.logit].every(Number.isFinite));
    const mean = (name) => finite.reduce((sum, one) => sum + one[name], 0) / finite.length;
    const some = finite.length < seen.length && { count: finite.length };
    if (finite.length) return { delta: mean("delta"), weight: mean("weight"), logit: mean("logit"), ...some };
    return { ...(seen[0] ?? tokens[0].sides[side]) };
  });
}
