"use strict";
// ASCII only, and text nodes only: nothing of the data is ever parsed as markup.
(() => {
  const lines = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const search = document.getElementById("search");
  const found = document.getElementById("found");
  const about = lines[0];
  const layers = new Map();
  for (const line of lines.slice(1)) {
    if (line.kind === "sae") {
      layers.set(line.layer, { sae: line, letters: new Map(), tasks: [], latents: new Map() });
    } else {
      const of = layers.get(line.layer);
      if (line.kind === "letter") of.letters.set(line.letter, line);
      if (line.kind === "task") of.tasks.push(line);
      if (line.kind === "latent") of.latents.set(line.latent, line);
    }
  }

  // -- Text and elements ------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "style") for (const [k, v] of Object.entries(value)) element.style.setProperty(k, v);
      else if (name === "on") for (const [k, v] of Object.entries(value)) element.addEventListener(k, v);
      else element.setAttribute(name, value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
  }
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  // What a reader cannot see, or what would move the text around it, is written out.
  const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\u2028\u2029]/u;
  const KNOWN = { "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d" };

  function seen(text, spaces) {
    const parts = [];
    let plain = "";
    const put = (node) => { if (plain) parts.push(plain); plain = ""; parts.push(node); };
    Array.from(text).forEach((char, i, all) => {
      if (KNOWN[char]) put(h("span", { class: "mark" }, KNOWN[char]));
      else if (UNSEEN.test(char)) {
        put(h("span", { class: "code" }, "U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
      } else if (spaces && char === " " && (i === 0 || i === all.length - 1)) put(h("span", { class: "mark" }, "\u2423"));
      else plain += char;
    });
    if (plain) parts.push(plain);
    return parts;
  }
  const token = (text) => h("span", { class: "tok" }, seen(text, true));

  const number = (x, digits) => x === null || x === undefined ? "\u2013" : Number(x).toFixed(digits === undefined ? 2 : digits).replace("-", "\u2212");
  const percent = (x) => x === null || x === undefined ? "\u2013" : x > 0 && x < 0.0095 ? (100 * x).toFixed(2) + "%" : Math.round(100 * x) + "%";
  const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
  const upper = (letter) => letter.toUpperCase();

  // -- Places -----------------------------------------------------------------------------------

  const at = (layer, ...rest) => "#/" + [layer, ...rest].map(encodeURIComponent).join("/");

  function link(layer, latent, text) {
    const name = text || "#" + latent;
    return layers.get(layer).latents.has(latent)
      ? h("a", { class: "id", href: at(layer, "latent", latent) }, name)
      : h("span", { class: "id soft", title: "not among the latents shown" }, name);
  }
  const letterLink = (layer, letter, text) => h("a", { href: at(layer, "letter", letter) }, text || upper(letter));
  const KIND = { fires: "f", absorbed: "a", lost: "l" };
  function chip(letter, i, current) {
    const word = letter.words[i];
    return h("a", {
      class: "chip " + KIND[word.fate], href: at(letter.layer, "letter", letter.letter, i), "aria-current": current ? "true" : null,
    }, seen(word.word, true));
  }
  const peaks = (line, n) => [...new Set((line ? line.examples : []).map((e) => e.tokens[e.at]))].slice(0, n).map((t) => [token(t), " "]);

  // Whether a latent that absorbs is the letter's own: by the words of the letter on which it fires.
  function kind(latent) {
    if (latent.on === null) return "unknown";
    if (latent.off > latent.on / 2) return "other";
    return latent.on >= 0.5 ? "letter" : latent.on >= 0.15 ? "part" : "other";
  }
  const absorber = (word) => word.carried[0][0];
  const ofAbsorber = (letter, id) => letter.absorbers.find((a) => a.latent === id);

  // -- Overview ---------------------------------------------------------------------------------

  const legend = () => h("ul", { class: "key" },
    h("li", {}, h("i", { class: "fires" }), "a main latent fires"),
    h("li", {}, h("i", { class: "absorbed" }), "absorbed: main latents silent, one other latent carries 40% or more"),
    h("li", {}, h("i", { class: "lost" }), "lost: main latents silent, and no latent carries that much"));

  function shares(counts) {
    const bar = ["fires", "absorbed", "lost"].map((fate) =>
      h("i", { class: fate, style: { width: 100 * counts[fate] / counts.words + "%" } }));
    const says = `${counts.fires} fire, ${counts.absorbed} absorbed, ${counts.lost} lost`;
    return h("div", { class: "bar", role: "img", "aria-label": says, title: says }, bar);
  }

  function overview(layer) {
    const { sae, letters, tasks, latents } = layers.get(layer);
    const all = [...letters.values()];
    const total = { words: 0, fires: 0, absorbed: 0, lost: 0 };
    for (const { counts } of all) for (const name in total) total[name] += counts[name];
    const taken = { letter: 0, part: 0, other: 0, unknown: 0 };
    for (const letter of all) for (const a of letter.absorbers) taken[kind(a)] += a.words;
    const go = (href) => ({ click: (e) => { if (!e.target.closest("a")) location.hash = href; } });
    const rows = all.map((letter) => h("tr", { class: "go", on: go(at(layer, "letter", letter.letter)) },
      h("td", {}, letterLink(layer, letter.letter)),
      h("td", {}, shares(letter.counts)),
      h("td", { class: "n" }, letter.counts.words), h("td", { class: "n" }, letter.counts.absorbed), h("td", { class: "n" }, letter.counts.lost),
      h("td", {}, letter.main.map((m) => [link(layer, m.latent), " "])),
      h("td", {}, letter.absorbers.slice(0, 3).map((a) => [link(layer, a.latent), `\u00a0\u00d7${a.words} `]),
        letter.absorbers.length > 3 ? h("span", { class: "soft" }, `and ${letter.absorbers.length - 3} more`) : null)));
    const byLatent = new Map();
    for (const t of tasks) byLatent.set(t.latent, (byLatent.get(t.latent) || []).concat(t));
    const taskRows = [...byLatent].map(([latent, of]) => h("tr", {},
      h("td", {}, link(layer, latent)),
      h("td", {}, of.map((t) => h("div", {}, `${t.task}: `, seen(t.class), h("span", { class: "soft" }, `  AUC ${number(t.auc)}, mean ${number(t.mean)} against ${number(t.mean_others)}`)))),
      h("td", {}, peaks(latents.get(latent), 4))));
    const random = [...latents.values()].filter((l) => l.roles.some((r) => r.role === "random"));
    return [
      h("h1", {}, "Which latent says the letter, and which takes it over"),
      h("p", { class: "soft" }, `${sae.sae}: layer ${layer} of ${about.model}, ${sae.d_sae} latents, L0 ${number(sae.l0, 1)} and ${percent(sae.dead)} dead on ${sae.tokens} held-out tokens. ${latents.size} latents are shown.`),
      all.length ? [
        h("p", { class: "lead" }, `The first-letter probes find ${total.words} words of ${all.length} letters. On ${percent(total.fires / total.words)} of them a main latent of their letter fires, ${percent(total.absorbed / total.words)} are absorbed, ${percent(total.lost / total.words)} are lost.`),
        h("h2", {}, `Who took the ${total.absorbed} absorbed words`),
        h("table", { id: "taken" }, h("tbody", {}, [
          ["letter", "a latent that itself follows the letter: it fires on half of the letter's words or more, and at most half as often on the others. SAE-Bench's sparse probe named another main latent"],
          ["part", "a latent of a part of the letter: on 15 to 50% of its words, and at most half as often on the others"],
          ["other", "a latent of something else, with the letter in its decoder row: what absorption is meant to find"],
          ["unknown", "a latent that is not among those shown"],
        ].filter(([what]) => what !== "unknown" || taken.unknown).map(([what, says]) => h("tr", {}, h("td", { class: "n" }, h("strong", {}, taken[what])), h("td", { class: "n" }, percent(taken[what] / Math.max(1, total.absorbed))), h("td", {}, says))))),
        h("h2", {}, "Letter by letter"),
        legend(),
        h("div", { class: "wide" }, h("table", { id: "letters" },
          h("thead", {}, h("tr", {}, ["", "words", "n", "absorbed", "lost", "main latents", "absorbing latents"].map((t) => h("th", {}, t)))),
          h("tbody", {}, rows))),
      ] : h("p", { class: "lead" }, "No letter is scored: SAE-Bench needs 20 letters whose probe reaches F1 0.6, and this model does not have them."),
      h("h2", {}, "Best latents of the probing tasks"),
      h("p", { class: "soft small" }, "Of each class the latent whose mean over its texts differs most from the other classes', as SAE-Bench chooses one for k = 1. AUC: a text of the class against one of the others."),
      h("div", { class: "wide" }, h("table", {}, h("thead", {}, h("tr", {}, ["latent", "best for", "fires most on"].map((t) => h("th", {}, t)))), h("tbody", {}, taskRows))),
      h("h2", {}, `${random.length} latents at random`),
      h("div", { class: "three" }, random.map((l) => h("a", { class: "card", href: at(layer, "latent", l.latent) },
        h("div", {}, h("span", { class: "id" }, "#" + l.latent), h("span", { class: "soft small" }, "  fires on " + percent(l.density))),
        h("div", {}, l.fires ? peaks(l, 4) : "dead on this text")))),
    ];
  }

  // -- A letter ---------------------------------------------------------------------------------

  const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);

  function order(letter) {
    const rank = { fires: 0, absorbed: 1, lost: 2 };
    const size = new Map(letter.absorbers.map((a, i) => [a.latent, i]));
    const key = (w) => w.fate === "absorbed" ? size.get(absorber(w)) : 0;
    return letter.words.map((_, i) => i).sort((i, j) => {
      const [a, b] = [letter.words[i], letter.words[j]];
      return rank[a.fate] - rank[b.fate] || key(a) - key(b) || b.main - a.main || b.projection - a.projection;
    });
  }

  // Latents that follow the letter, or a part of it, and carry some of a word beside the first.
  const rivals = (letter, word) => word.carried.slice(1).filter(([id]) => {
    const a = ofAbsorber(letter, id);
    return a && ["letter", "part"].includes(kind(a));
  });

  // The word to begin with: taken by a latent of something else than the letter, and one whose
  // projection is no accident.
  function instructive(letter) {
    let best = order(letter)[0], most = -1;
    const high = Math.max(1e-6, ...letter.words.map((word) => word.projection));
    letter.words.forEach((word, i) => {
      if (word.fate !== "absorbed") return;
      const narrow = { other: 20, part: 10, letter: 0, unknown: 0 }[kind(ofAbsorber(letter, absorber(word)))];
      const share = word.carried[0][2] / word.projection;
      const alone = rivals(letter, word).length === 0;
      const worth = narrow + (share <= 1.1 ? 5 : 0) + (alone ? 3 : 0) + word.projection / high;
      if (worth > most) [best, most] = [i, worth];
    });
    return best;
  }

  function picture(letter, current) {
    const indices = order(letter), step = 15, high = 190, foot = 84, left = 34;
    const parts = indices.map((i) => {
      const w = letter.words[i], top = w.carried.length ? w.carried[0][2] : 0;
      return { i, w, values: [["m", w.main], [w.fate === "absorbed" ? "k" : "k part", top], ["r", w.projection - w.main - top]] };
    });
    const sum = (p, sign) => p.values.reduce((t, [, v]) => t + Math.max(0, sign * v), 0);
    const up = Math.max(1e-6, ...parts.map((p) => Math.max(sum(p, 1), p.w.projection)));
    const down = Math.max(0, ...parts.map((p) => sum(p, -1)));
    const y = (v) => 8 + (up - v) / (up + down) * high;
    const width = left + indices.length * step + 24;
    const ticks = [0, up / 2, up].map((v) => [
      s("line", { x1: left, x2: width - 20, y1: y(v), y2: y(v), class: v ? "axis" : "zero" }),
      s("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "soft" }, number(v, 1))]);
    const bars = parts.map(({ i, w, values }, k) => {
      const x = left + k * step + 2;
      let [above, below] = [0, 0];
      const rects = values.map(([kind, v]) => {
        const from = v >= 0 ? above : below, to = from + v;
        if (v >= 0) above = to; else below = to;
        return s("rect", { x, width: step - 4, y: y(Math.max(from, to)), height: Math.max(0, Math.abs(y(from) - y(to))), class: kind });
      });
      return s("g", { class: "w", "data-i": i, "aria-current": i === current ? "true" : null, on: { click: () => { location.hash = at(letter.layer, "letter", letter.letter, i); } } },
        s("title", {}, `${w.word}: ${w.fate}`),
        s("rect", { class: "hit", x: x - 2, y: 0, width: step, height: high + foot }),
        rects,
        s("line", { class: "tick", x1: x - 1, x2: x + step - 3, y1: y(w.projection), y2: y(w.projection) }),
        s("text", { class: "lab " + KIND[w.fate], "text-anchor": "end", transform: `translate(${x + 8},${high + 22}) rotate(-58)` }, seen(w.word.trim()).map((p) => typeof p === "string" ? p : p.textContent).join("").slice(0, 12)));
    });
    return h("div", { class: "wide" }, s("svg", {
      width, height: high + foot, role: "img", "aria-label": `what carries the first letter on ${letter.words.length} words`, id: "picture",
    }, ticks, bars));
  }

  function sums(letter, i) {
    const w = letter.words[i], { layer } = letter;
    const one = letter.main.length === 1;
    const rows = [
      ["main", [one ? "main latent " : "main latents ", letter.main.map((m) => [link(layer, m.latent), " "])], w.main],
      ...w.carried.map(([id, act, part], k) => [k ? "part" : "take", [link(layer, id), h("span", { class: "soft" }, `  ${number(act, 1)} \u00d7 cos ${number(part / act)}`)], part]),
      ["rest", "all other latents", w.rest], ["rest", "decoder bias", w.bias], ["rest", "what the SAE leaves out", w.error]];
    let from = 0, to = 0, sum = 0;
    for (const [, , v] of rows) { from = Math.min(from, v); to = Math.max(to, v); sum += v; }
    to = Math.max(to, w.projection); from = Math.min(from, w.projection);
    const wide = to - from || 1, zero = 100 * -from / wide + "%";
    const colour = { main: "var(--main)", take: "var(--take)", part: "color-mix(in srgb, var(--take) 50%, var(--card))", rest: "var(--rest)", total: "var(--ink)" };
    const row = ([what, name, v]) => h("tr", { class: what === "total" ? what : null }, h("td", {}, name), h("td", { class: "n" }, number(v)),
      h("td", {}, h("div", { class: "track", style: { "--zero": zero } }, h("i", { style: {
        left: 100 * (Math.min(0, v) - from) / wide + "%", width: 100 * Math.abs(v) / wide + "%", background: colour[what] } }))));
    return h("div", {}, h("h3", {}, token(w.word), ` ${w.fate === "fires" ? "a main latent fires" : w.fate}`),
      h("table", { class: "sum" }, h("tbody", {}, rows.map(row), row(["total", "projection on the probe", w.projection]))));
  }

  function rates(letter, latent, words) {
    return latent.on === null ? "" : `fires on ${percent(latent.on)} of the ${upper(letter.letter)}-words and ${percent(latent.off)} of the others`;
  }

  function explain(letter, i) {
    const w = letter.words[i], { layer } = letter, L = upper(letter.letter), { latents } = layers.get(layer);
    const names = letter.main.map((m) => link(layer, m.latent));
    const mains = [letter.main.length === 1 ? "The main latent " : "The main latents ", names.map((n, k) => [k ? ", " : "", n])];
    const firing = letter.words.map((_, k) => k).filter((k) => letter.words[k].fate === "fires");
    const usual = firing.length ? [` ${letter.main.length === 1 ? "fires" : "fire"} on ${letter.counts.fires} of ${letter.counts.words} ${L}-words and ${letter.main.length === 1 ? "carries" : "carry"} ${number(mean(firing.map((k) => letter.words[k].main)), 1)} there on average`] : [` never ${letter.main.length === 1 ? "fires" : "fire"} on ${L}-words`];
    const start = h("p", {}, "In a prompt that asks for its first letter, the residual of ", token(w.word), ` projects ${number(w.projection, 1)} onto the probe of ${L}, and the probe finds the letter in it. `);
    const parts = [start], tell = (...told) => fill(start, {}, told);
    let show = null;
    if (w.fate === "absorbed") {
      const [id, act, part] = w.carried[0], a = ofAbsorber(letter, id), line = latents.get(id);
      show = id;
      tell([mains, usual, firing.length ? `; here ${letter.main.length === 1 ? "it is" : "they are"} silent` : ", nor here"], ". Instead ", link(layer, id), ` is active at ${number(act, 1)}. Its decoder row has cosine ${number(part / act)} with the probe, so by itself it writes ${number(part, 1)} of the letter, ${percent(part / w.projection)} of the projection: from 40% on SAE-Bench calls the word absorbed.${part > 1.5 * w.projection ? " So much more than all of it says little: the parts below nearly cancel, and the projection is small." : ""}`);
      const mine = `${letter.main.map((m) => `${percent(m.on)} and ${percent(m.off)}`).join("; ")}`;
      const most = line && line.fires ? [" It fires most on ", peaks(line, 5), "in ordinary text"] : [" It does not fire in the held-out text"];
      parts.push({
        letter: () => h("p", { class: "verdict own" }, h("strong", {}, "A latent of the letter took it. "), link(layer, id), ` ${rates(letter, a)} (${letter.main.length === 1 ? "the main latent" : "the main ones"}: ${mine}): it says ${L} itself, and the sparse probe named another latent for it.`, most, ". SAE-Bench counts the word; its letter did not hide in a latent of its own."),
        part: () => h("p", { class: "verdict own" }, h("strong", {}, "A latent of a part of the letter took it. "), link(layer, id), ` ${rates(letter, a)} (${letter.main.length === 1 ? "the main latent" : "the main ones"}: ${mine}): it says some of the ${L}-words, as where a feature is split.`, most, "."),
        other: () => h("p", { class: "verdict" }, h("strong", {}, "A latent of something else took it. "), link(layer, id), ` ${rates(letter, a)}: it does not say ${L}.`, most, `. Its decoder row has the letter in it, and where it fires the letter comes along: absorption.`,
          rivals(letter, w).length ? [" Beside it ", rivals(letter, w).map(([other, , p], k) => [k ? ", " : "", link(layer, other), ` carries ${number(p, 1)}`]), `, which ${rivals(letter, w).length === 1 ? "follows" : "follow"} ${L}: not all of the letter hides.`] : ` No latent that follows ${L} is among those that carry most.`),
        unknown: () => h("p", { class: "verdict" }, link(layer, id), " is not among the latents shown."),
      }[kind(a)]());
    } else if (w.fate === "lost") {
      tell([mains, usual, firing.length ? `; here ${letter.main.length === 1 ? "it is" : "they are"} silent` : ", nor here"], `, and no other latent carries 40%: `, w.carried.length ? [link(layer, w.carried[0][0]), ` comes first with ${percent(w.carried[0][2] / w.projection)}.`] : "none is aligned with the probe.");
      tell(` The SAE leaves ${number(w.error, 1)} out.`);
      show = w.carried.length ? w.carried[0][0] : null;
    } else {
      tell([mains, ` ${letter.main.length === 1 ? "carries" : "carry"} ${number(w.main, 1)} of it (${percent(w.main / w.projection)}). SAE-Bench's absorption fraction of the word is ${number(w.fraction)}.`]);
      show = w.carried.length && w.carried[0][2] > w.main ? w.carried[0][0] : letter.main[0].latent;
    }
    const beside = firing.filter((k) => k !== i).sort((a, b) => Math.abs(letter.words[a].projection - w.projection) - Math.abs(letter.words[b].projection - w.projection))[0];
    parts.push(h("div", { class: "two" }, sums(letter, i), w.fate !== "fires" && beside !== undefined ? sums(letter, beside) : null));
    const line = latents.get(show);
    if (line && line.fires) parts.push(h("h3", {}, link(layer, show), " in ordinary text"), line.examples.slice(0, 3).map((e) => example(e, line)), profile(line, letter.letter));
    return h("section", { class: "card", id: "explained", "aria-live": "polite" }, h("h2", {}, w.fate === "absorbed" ? "How " : "", token(w.word), { absorbed: " is absorbed", lost: " is lost", fires: " keeps its letter" }[w.fate]), parts);
  }

  function letterView(layer, name, chosen) {
    const letter = layers.get(layer).letters.get(name), { latents } = layers.get(layer), L = upper(name);
    const i = chosen === undefined ? instructive(letter) : Number(chosen);
    if (!letter.words[i]) return null;
    const listed = letter.words.length < letter.counts.words ? ` ${letter.words.length} of them are listed.` : "";
    const row = (latent, extra) => h("tr", {}, h("td", {}, link(layer, latent.latent)), h("td", { class: "n" }, number(latent.cos)),
      h("td", { class: "n" }, percent(latent.on)), h("td", { class: "n" }, percent(latent.off)), h("td", {}, peaks(latents.get(latent.latent), 3)), h("td", {}, extra));
    const byFate = (fate) => order(letter).filter((k) => letter.words[k].fate === fate);
    const chips = (indices) => h("ul", { class: "chips" }, indices.map((k) => h("li", {}, chip(letter, k, k === i))));
    const head = (...names) => h("thead", {}, h("tr", {}, names.map((n) => h("th", {}, n))));
    const columns = ["latent", "cosine with probe", `fires on ${L}-words`, "on others", "fires most on"];
    const groups = letter.absorbers.map((a) => row(a, chips(byFate("absorbed").filter((k) => absorber(letter.words[k]) === a.latent))));
    return [
      h("h1", {}, `${L}: ${plural(letter.counts.words, "word")}, ${letter.counts.fires} with a main latent, ${letter.counts.absorbed} absorbed, ${letter.counts.lost} lost`),
      h("p", { class: "soft" }, `The probe's F1 is ${number(letter.f1)}; SAE-Bench's absorption fraction ${number(letter.fraction)}, full absorption ${number(letter.counts.absorbed / letter.counts.words)}.${listed} Other letters: `,
        [...layers.get(layer).letters.keys()].map((n) => [n === name ? h("strong", {}, upper(n)) : letterLink(layer, n), " "])),
      h("p", {}, "A bar is a word; its parts add up to the black tick, the projection of the residual on the letter's probe. Choose one."),
      h("ul", { class: "key" }, h("li", {}, h("i", { class: "fires" }), "main latents"), h("li", {}, h("i", { class: "absorbed" }), "the other latent that carries most (pale where the word is not absorbed)"),
        h("li", {}, h("i", { class: "rest" }), "everything else: other latents, bias, error"), h("li", {}, h("i", { class: "tick" }), "the projection")),
      picture(letter, i),
      explain(letter, i),
      h("h2", {}, "Main latents"), h("div", { class: "wide" }, h("table", {}, head(...columns, ""), h("tbody", {}, letter.main.map((m) => row(m, ""))))),
      letter.absorbers.length ? [h("h2", {}, "Absorbing latents and their words"), h("div", { class: "wide" }, h("table", { id: "absorbers" }, head(...columns, "words absorbed"), h("tbody", {}, groups)))] : null,
      byFate("lost").length ? [h("h2", {}, "Words lost"), chips(byFate("lost"))] : null,
      byFate("fires").length ? [h("h2", {}, "Words on which a main latent fires"), chips(byFate("fires"))] : null,
    ];
  }

  // -- A latent ---------------------------------------------------------------------------------

  function example(e, line) {
    const shaded = e.tokens.map((t, k) => {
      const a = e.acts[k];
      const says = a === null ? "not scored" : number(a, 1);
      return h("span", { class: "t" + (k === e.at ? " at" : "") + (a === null ? " off" : ""), title: says, style: a ? { "--a": Math.min(1, a / line.max).toFixed(3) } : null }, seen(t));
    });
    return h("div", { class: "text" }, h("b", {}, number(e.acts[e.at], 1)), h("span", { class: "line" }, shaded));
  }

  function histogram(line) {
    const w = 300, high = 90, most = Math.max(...line.histogram), step = w / line.histogram.length;
    const y = (n) => n ? Math.max(1.5, high * Math.log1p(n) / Math.log1p(most)) : 0;
    return s("svg", { width: w + 2, height: high + 32, role: "img", "aria-label": "histogram of activations" },
      line.histogram.map((n, i) => s("rect", { class: "m", x: i * step + 0.5, width: step - 1, y: high + 2 - y(n), height: y(n) },
        s("title", {}, `${number(i * line.max / line.histogram.length, 1)} to ${number((i + 1) * line.max / line.histogram.length, 1)}: ${n}`))),
      s("line", { class: "zero", x1: 0, x2: w, y1: high + 2.5, y2: high + 2.5 }),
      s("text", { x: 0, y: high + 17, class: "soft" }, "0"), s("text", { x: w, y: high + 17, "text-anchor": "end", class: "soft" }, number(line.max, 1)),
      s("text", { x: w / 2, y: high + 28, "text-anchor": "middle", class: "soft" }, `activation where it fires (log counts, up to ${most})`));
  }

  function profile(line, mark) {
    const names = Object.keys(line.letters);
    if (!names.length) return null;
    const step = 13, high = 44;
    return h("div", {}, h("div", { class: "soft small" }, "share of each letter's words on which it fires"), h("div", { class: "wide" },
      s("svg", { width: names.length * step + 4, height: high + 18, role: "img", "aria-label": "share of each letter's words on which it fires" },
        names.map((n, k) => [
          s("rect", { class: n === mark ? "k" : "m", x: k * step + 1, width: step - 3, y: high - high * line.letters[n], height: Math.max(0.8, high * line.letters[n]) }, s("title", {}, `${n}: ${percent(line.letters[n])}`)),
          s("text", { x: k * step + 6, y: high + 13, "text-anchor": "middle", class: n === mark ? "" : "soft" }, n)]))));
  }

  function role(layer, r) {
    if (r.role === "main") return ["main latent of ", letterLink(layer, r.letter), ` (cosine ${number(r.cos)})`];
    if (r.role === "absorbs") return ["absorbs ", plural(r.words, "word"), " of ", letterLink(layer, r.letter), ` (cosine ${number(r.cos)})`];
    if (r.role === "task") return [`best for ${r.task}: `, seen(r.class), ` (AUC ${number(r.auc)})`];
    return "drawn at random";
  }

  function latentView(layer, latent) {
    const line = layers.get(layer).latents.get(latent), { sae, letters } = layers.get(layer);
    const pairs = (list) => h("ul", { class: "chips" }, list.map(([t, x]) => h("li", {}, token(t), h("span", { class: "soft small" }, " " + number(x, 1)))));
    const absorbed = [];
    for (const letter of letters.values()) letter.words.forEach((w, i) => { if (w.fate === "absorbed" && absorber(w) === latent) absorbed.push(chip(letter, i)); });
    const stat = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    return [
      h("h1", {}, `Latent ${latent}`, line.examples.length ? h("span", { class: "soft" }, "  ", peaks(line, 3)) : null),
      h("p", {}, line.roles.map((r, i) => [i ? "; " : "", role(layer, r)])),
      h("dl", { class: "stats" }, stat("fires on", percent(line.density)), stat("tokens", line.fires), stat("mean where it fires", number(line.mean, 1)), stat("maximum", number(line.max, 1))),
      absorbed.length ? [h("h3", {}, "words it absorbs"), h("ul", { class: "chips" }, absorbed.map((c) => h("li", {}, c)))] : null,
      line.fires ? [
        h("div", { class: "two" }, histogram(line), profile(line)),
        h("h2", {}, "Where it fires most"), h("div", { class: "card" }, line.examples.map((e) => example(e, line))),
        line.middle.length ? [h("h2", {}, "From the middle of its range"), h("div", { class: "card" }, line.middle.map((e) => example(e, line)))] : null,
      ] : h("p", { class: "lead" }, `It fires on none of the ${sae.tokens} held-out tokens.`),
      h("div", { class: "two" },
        h("div", {}, h("h2", {}, "Tokens it promotes"), pairs(line.promoted)), h("div", {}, h("h2", {}, "Tokens it suppresses"), pairs(line.suppressed))),
      line.words.length ? [h("h2", {}, "Words of the absorption prompts"), pairs(line.words)] : null,
      h("div", { class: "two" },
        h("div", {}, h("h2", {}, "Nearest latents"), h("p", { class: "soft small" }, "By the cosine of their decoder rows."),
          h("table", {}, h("tbody", {}, line.nearest.map(([id, c]) => h("tr", {}, h("td", {}, link(layer, id)), h("td", { class: "n" }, number(c)), h("td", {}, peaks(layers.get(layer).latents.get(id), 3))))))),
        h("div", {}, h("h2", {}, "The same latent in other seeds"), h("p", { class: "soft small" }, "The one with the largest cosine there."),
          line.seeds.length ? h("table", {}, h("tbody", {}, line.seeds.map(([id, c], k) => h("tr", {}, h("td", {}, sae.others[k]), h("td", {}, "#" + id), h("td", { class: "n" }, number(c)))))) : h("p", {}, "There is one seed."))),
    ];
  }

  // -- Where we are -----------------------------------------------------------------------------

  let place = { layer: [...layers.keys()][0], view: "overview" };

  function parse() {
    const [layer, view, name, index] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
    const of = layers.get(Number(layer));
    if (!layer || !of) return { layer: [...layers.keys()][0], view: "overview" };
    if (view === "letter" && of.letters.has(name)) return { layer: Number(layer), view, name, index };
    if (view === "latent" && of.latents.has(Number(name))) return { layer: Number(layer), view, name: Number(name) };
    return { layer: Number(layer), view: "overview" };
  }

  function draw() {
    const before = place;
    place = parse();
    const { layer, view, name, index } = place;
    const same = before.view === "letter" && view === "letter" && before.name === name && before.layer === layer && main.firstChild;
    const scrolled = same ? document.querySelector("#picture").parentNode.scrollLeft : 0;
    const drawn = (view === "letter" && letterView(layer, name, index)) || (view === "latent" && latentView(layer, name)) || overview(layer);
    main.replaceChildren();
    fill(main, {}, [drawn]);
    document.title = `${about.run}: ${view === "letter" ? upper(name) : view === "latent" ? "latent " + name : "latents"}`;
    const nav = document.getElementById("layers");
    nav.replaceChildren(...[...layers.keys()].map((l) => h("a", { href: at(l), "aria-current": l === layer ? "page" : null }, `layer ${l}`)));
    const drawing = document.querySelector("#picture"), chosen = drawing && drawing.querySelector("[aria-current]");
    if (same) drawing.parentNode.scrollLeft = scrolled;
    if (chosen) {
      const [box, bar] = [drawing.parentNode.getBoundingClientRect(), chosen.getBoundingClientRect()];
      if (bar.left < box.left || bar.right > box.right) drawing.parentNode.scrollLeft += bar.left - box.left - box.width / 2;
    }
    if (!same) { window.scrollTo(0, 0); if (document.activeElement !== search) main.focus({ preventScroll: true }); }
  }

  function move(by) {
    const { layer, view, name, index } = place, of = layers.get(layer);
    if (view === "latent") {
      const ids = [...of.latents.keys()], k = ids.indexOf(name) + by;
      location.hash = at(layer, "latent", ids[(k + ids.length) % ids.length]);
    } else if (view === "letter") {
      const letter = of.letters.get(name), indices = order(letter);
      const k = indices.indexOf(index === undefined ? instructive(letter) : Number(index)) + by;
      location.hash = at(layer, "letter", name, indices[(k + indices.length) % indices.length]);
    } else if (of.letters.size) location.hash = at(layer, "letter", by > 0 ? [...of.letters.keys()][0] : [...of.letters.keys()].pop());
  }

  // -- Search -----------------------------------------------------------------------------------

  const plain = (text) => text.trim().toLowerCase();
  const index = [];
  for (const [layer, of] of layers) {
    for (const line of of.latents.values()) {
      const says = new Map();
      const add = (text, weight, why) => { const t = plain(text); if (t && (!says.has(t) || says.get(t)[0] < weight)) says.set(t, [weight, why, text]); };
      for (const e of line.examples) add(e.tokens[e.at], 3, "fires on");
      for (const [w] of line.words) add(w, 2, "fires on the word");
      for (const [t] of line.promoted) add(t, 1, "promotes");
      for (const [t] of line.suppressed) add(t, 0.5, "suppresses");
      index.push({ layer, href: at(layer, "latent", line.latent), id: String(line.latent), says });
    }
    for (const letter of of.letters.values()) letter.words.forEach((w, i) => index.push({
      layer, href: at(layer, "letter", letter.letter, i), word: w.word, says: new Map([[plain(w.word), [4, w.fate, w.word]]]) }));
  }

  function query(text) {
    const wanted = plain(text).replace(/^#/, "");
    if (!wanted) return [];
    const hits = [];
    for (const entry of index) {
      let score = -1, why = null;
      if (entry.id !== undefined && /^\d+$/.test(wanted) && entry.id.startsWith(wanted)) score = entry.id === wanted ? 100 : 50 - entry.id.length;
      for (const [t, [weight, reason, shown]] of entry.says) {
        const fit = t === wanted ? 20 : t.startsWith(wanted) ? 8 : t.includes(wanted) ? 2 : 0;
        if (fit && fit + weight > score) [score, why] = [fit + weight, [reason, shown]];
      }
      if (score >= 0) hits.push({ entry, score, why });
    }
    return hits.sort((a, b) => b.score - a.score).slice(0, 14);
  }

  let picked = 0;
  function look() {
    const hits = query(search.value);
    picked = 0;
    const many = layers.size > 1;
    found.replaceChildren(...hits.map(({ entry, why }, k) => h("li", { role: "option", id: "found-" + k, "aria-selected": k === 0 ? "true" : "false", "data-href": entry.href, on: { mousedown: (e) => { e.preventDefault(); choose(k); } } },
      entry.word !== undefined ? ["word ", token(entry.word), h("span", { class: "soft" }, " " + why[0])] : [h("span", { class: "id" }, "#" + entry.id), why ? [h("span", { class: "soft" }, ` ${why[0]} `), token(why[1])] : null],
      many ? h("span", { class: "soft" }, ` layer ${entry.layer}`) : null)));
    if (!hits.length && search.value.trim()) found.replaceChildren(h("li", { class: "soft" }, "nothing among what is shown"));
    open(search.value.trim() !== "");
  }
  function open(yes) {
    found.hidden = !yes;
    search.setAttribute("aria-expanded", String(yes));
    if (yes && found.querySelector("[role=option]")) search.setAttribute("aria-activedescendant", "found-" + picked); else search.removeAttribute("aria-activedescendant");
  }
  function pick(by) {
    const options = [...found.querySelectorAll("[role=option]")];
    if (!options.length) return;
    picked = (picked + by + options.length) % options.length;
    options.forEach((o, k) => o.setAttribute("aria-selected", String(k === picked)));
    options[picked].scrollIntoView({ block: "nearest" });
    open(true);
  }
  function choose(k) {
    const option = found.querySelectorAll("[role=option]")[k];
    if (!option) return;
    open(false);
    search.value = "";
    search.blur();
    location.hash = option.dataset.href;
  }
  search.addEventListener("input", look);
  search.addEventListener("focus", () => { if (search.value.trim()) open(true); });
  search.addEventListener("blur", () => open(false));
  search.addEventListener("keydown", (e) => {
    const keys = { ArrowDown: () => pick(1), ArrowUp: () => pick(-1), Enter: () => choose(picked), Escape: () => { search.value = ""; open(false); search.blur(); } };
    if (keys[e.key]) { e.preventDefault(); e.stopPropagation(); keys[e.key](); }
  });

  // -- Keys and colours -------------------------------------------------------------------------

  const keys = document.getElementById("keys");
  const kept = { get: () => { try { return localStorage.getItem("features-theme"); } catch { return null; } }, set: (v) => { try { localStorage.setItem("features-theme", v); } catch { /* files may have none */ } } };
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const paint = () => { document.documentElement.dataset.theme = kept.get() || (system.matches ? "dark" : "light"); };
  const turn = () => { const to = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; kept.set(to); document.documentElement.dataset.theme = to; };
  system.addEventListener("change", paint);
  document.getElementById("theme").addEventListener("click", turn);
  document.getElementById("help").addEventListener("click", () => keys.showModal());
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || keys.open || e.target === search) return;
    const does = { "/": () => { search.focus(); search.select(); }, "?": () => keys.showModal(), t: turn, ArrowRight: () => move(1), ArrowLeft: () => move(-1), u: () => { location.hash = at(place.layer); } }[e.key];
    if (does) { e.preventDefault(); does(); }
  });
  window.addEventListener("hashchange", draw);
  paint();
  if (layers.size) draw(); else main.replaceChildren("Nothing was written.");
})();
