"use strict";
// Texts come from data sets: they are only ever set as textContent.
(() => {
  const records = JSON.parse(document.getElementById("numbers").textContent);
  // Cividis, which looks the same with and without colour blindness (Nuñez, Anderton, Renslow 2018)
  const SCALE = [[0, 34, 78], [42, 63, 109], [87, 92, 109], [124, 123, 120], [165, 156, 116], [210, 193, 95], [254, 232, 56]];
  const MOST_LABELLED = 8; // columns up to which a number fits into a cell
  const state = { view: "attention", scale: "own", opacity: 0.68 };
  const redraws = [];

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const colour = (share) => {
    const at = Math.max(0, Math.min(1, share)) * (SCALE.length - 1), low = Math.min(Math.floor(at), SCALE.length - 2);
    return `rgb(${SCALE[low].map((value, i) => Math.round(value + (at - low) * (SCALE[low + 1][i] - value))).join(",")})`;
  };
  const percent = (share) => {
    const value = 100 * share;
    return `${value === 0 || value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
  };
  const mean = (rows) => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);

  // What can be chosen: the mean of each answer, then its tokens
  const choicesOf = (side) => {
    const choices = [];
    for (const turn of [...new Set(side.tokens.map((token) => token.turn))]) {
      const members = side.tokens.map((token, i) => (token.turn === turn ? i : -1)).filter((i) => i >= 0);
      choices.push({ name: "mean of the answer", turn, members });
      for (const i of members) choices.push({ name: side.tokens[i].text, turn, members: [i], token: side.tokens[i] });
    }
    return choices;
  };
  const shown = (text) => text.replace(/^ +| +$/g, (blanks) => "·".repeat(blanks.length)).replace(/\n/g, "↵");

  const drawSide = (record, side, place, choose) => {
    const choices = choicesOf(side), bar = place.querySelector(".tokens"), says = place.querySelector(".cell");
    const several = new Set(choices.map((choice) => choice.turn)).size > 1;
    const buttons = choices.map((choice, i) => {
      if (several && !choice.token) bar.append(make("span", "turn", `answer ${choice.turn + 1}`));
      const button = make("button", choice.token ? "token" : "token average", choice.token ? shown(choice.name) : "mean");
      button.type = "button";
      if (choice.token) {
        const delta = choice.token.delta;
        if (delta !== null) {
          button.style.background = `rgba(${delta > 0 ? "94,60,153" : "230,97,1"},${(0.45 * Math.min(Math.abs(delta) / 5, 1)).toFixed(2)})`;
          if (delta < -1) button.classList.add("against");
        }
        button.title = delta === null ? "no image before it" : `Δ ${delta > 0 ? "+" : ""}${delta.toFixed(2)}`;
        button.setAttribute("aria-label", `token ${shown(choice.name)}, ${button.title}`);
      } else button.setAttribute("aria-label", "mean over the tokens of the answer");
      button.addEventListener("click", () => choose(i, place));
      button.addEventListener("mouseenter", () => choose(i, place, true));
      button.addEventListener("focus", () => { if (button.matches(":focus-visible")) choose(i, place); });
      bar.append(button);
      return button;
    });
    bar.addEventListener("mouseleave", () => choose(null, place, true));
    bar.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const next = Math.max(0, Math.min(buttons.length - 1, buttons.indexOf(document.activeElement) + step));
      buttons[next].focus();
      choose(next, place);
    });
    const stages = side.images.map((image, number) => drawStage(record, side, image, number, place, says));
    return { choices, buttons, stages };
  };

  const drawStage = (record, side, image, number, place, says) => {
    const holder = make("div"), scroll = make("div", "scroll"), stage = make("div", "stage"), grid = make("div", "grid"), picture = make("img");
    picture.src = image.src;
    picture.alt = `image ${number + 1} of ${record.id}`;
    picture.width = image.width;
    picture.height = image.height;
    stage.style.setProperty("--columns", image.columns);
    grid.style.gridTemplate = `repeat(${image.rows}, minmax(0, 1fr)) / repeat(${image.columns}, minmax(0, 1fr))`;
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", `${image.rows} rows of ${image.columns} patches of image ${number + 1}; move with the arrow keys`);
    const now = { shares: null, name: "" };
    const tell = (i) => {
      const words = image.words[i].map(([word, cosine]) => `${word} ${cosine.toFixed(2)}`).join(", ");
      return `Row ${Math.floor(i / image.columns) + 1}, column ${(i % image.columns) + 1}: ${percent(now.shares[i])} of the attention (${now.name}). Nearest words: ${words}.`;
    };
    const cells = image.words.map((_, i) => {
      const cell = make("button", "patch");
      cell.type = "button";
      cell.tabIndex = i === 0 ? 0 : -1;
      cell.append(make("span"));
      const look = () => {
        says.textContent = tell(i);
        for (const twin of document.querySelectorAll(".patch.same")) twin.classList.remove("same");
        const others = place.parentElement.querySelectorAll(".side");
        for (const other of others) {
          const found = other.querySelectorAll(".grid")[number];
          if (other !== place && found && found.children.length === cells.length) found.children[i].classList.add("same");
        }
      };
      cell.addEventListener("mouseenter", look);
      cell.addEventListener("focus", look);
      cell.addEventListener("click", () => cell.focus());
      return cell;
    });
    grid.append(...cells);
    grid.addEventListener("keydown", (event) => {
      const at = cells.indexOf(document.activeElement), column = at % image.columns;
      const next = { ArrowRight: column < image.columns - 1 ? at + 1 : at, ArrowLeft: column > 0 ? at - 1 : at,
        ArrowDown: at + image.columns, ArrowUp: at - image.columns, Home: 0, End: cells.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      if (!cells[next]) return;
      cells[at].tabIndex = -1;
      cells[next].tabIndex = 0;
      cells[next].focus();
    });
    const legend = make("div", "legend"), ramp = make("div", "ramp"), high = make("span"), low = make("span", "", "0 %"), sum = make("p", "sum");
    ramp.style.background = `linear-gradient(90deg, ${SCALE.map((_, i) => colour(i / (SCALE.length - 1))).join(",")})`;
    legend.append(low, ramp, high);
    stage.append(picture, grid);
    scroll.append(stage);
    holder.append(scroll, legend, sum);
    place.querySelector(".stages").append(holder);
    return (choice, shared) => {
      const shares = mean(choice.members.map((i) => image.attention[i])), most = Math.max(...shares);
      now.shares = shares;
      now.name = choice.token ? `token “${shown(choice.name)}”` : choice.name;
      const top = state.scale === "own" ? most : shared, words = state.view === "words", attention = state.view === "attention";
      legend.hidden = !attention;
      legend.style.display = attention ? "" : "none";
      high.textContent = percent(top);
      const total = shares.reduce((one, two) => one + two, 0), at = shares.indexOf(most);
      sum.textContent = `${now.name}: ${percent(total)} of the attention goes to ${side.images.length > 1 ? `image ${number + 1}` : "the image"}, most to row ${Math.floor(at / image.columns) + 1}, column ${(at % image.columns) + 1} (${percent(most)}).`;
      stage.style.minWidth = words && image.columns > MOST_LABELLED ? `${image.columns * 3.4}rem` : "";
      cells.forEach((cell, i) => {
        cell.style.setProperty("--shade", attention ? colour(top > 0 ? shares[i] / top : 0) : "transparent");
        cell.style.setProperty("--strength", attention ? state.opacity : 0);
        const label = cell.firstChild;
        label.textContent = words ? image.words[i][0][0] : attention && image.columns <= MOST_LABELLED ? percent(shares[i]) : "";
        label.style.display = label.textContent ? "" : "none";
        cell.setAttribute("aria-label", tell(i));
      });
      stage.style.setProperty("--letters", Math.max(4, ...cells.map((cell) => cell.textContent.length)));
    };
  };

  records.forEach((record, number) => {
    const place = document.querySelector(`[data-record="${number}"]`), places = [...place.querySelectorAll(".side")];
    const alike = record.sides.length === 1 || JSON.stringify(record.sides[0].tokens.map((t) => [t.text, t.turn])) === JSON.stringify(record.sides[1].tokens.map((t) => [t.text, t.turn]));
    const chosen = record.sides.map(() => 0);
    const shared = Math.max(...record.sides.flatMap((side) => side.images.flatMap((image) => image.attention.map((row) => Math.max(...row)))));
    const draw = () => sides.forEach((side, i) => {
      side.buttons.forEach((button, at) => {
        button.setAttribute("aria-pressed", at === chosen[i]);
        button.tabIndex = at === chosen[i] ? 0 : -1;
      });
      for (const redraw of side.stages) redraw(side.choices[chosen[i]], shared);
    });
    const kept = record.sides.map(() => 0);
    const choose = (at, from, passing) => {
      places.forEach((one, i) => {
        if (one !== from && !alike) return;
        if (at === null) chosen[i] = kept[i];
        else chosen[i] = at;
        if (!passing) kept[i] = chosen[i];
      });
      draw();
    };
    const sides = record.sides.map((side, i) => drawSide(record, side, places[i], choose));
    redraws.push(draw);
    draw();
  });

  const redraw = () => redraws.forEach((draw) => draw());
  const set = (name, value) => {
    state[name] = value;
    for (const input of document.getElementsByName(name)) input.checked = input.value === value;
    redraw();
  };
  for (const name of ["view", "scale"]) for (const input of document.getElementsByName(name)) input.addEventListener("change", () => set(name, input.value));
  document.getElementById("opacity").addEventListener("input", (event) => { state.opacity = event.target.value / 100; redraw(); });
  document.getElementById("bar").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const view = { a: "attention", w: "words", n: "plain" }[event.key];
    if (view) set("view", view);
  });
})();
