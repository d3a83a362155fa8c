// The playground's page: a draft of chunks, kept here and sent along with every call; the server keeps nothing.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const about = JSON.parse(at("data").textContent);
  const chunks = []; // {hex, text, latent, draw, ends, node}
  let chosen = -1, held = null, running = null;

  // ---- what is shown
  const say = (text) => { at("said").textContent = text; };
  const complain = (text) => {
    at("wrong").textContent = text;
    at("wrong").hidden = !text;
  };
  const node = (tag, text, name = "") => {
    const found = document.createElement(tag);
    found.textContent = text;
    if (name) found.className = name;
    return found;
  };
  const showPrompt = () => { at("shown-prompt").textContent = at("prompt").value; };

  function append(chunk) {
    const isHeld = held !== null && String(held.latent) === String(chunk.latent);
    const span = node("span", chunk.text, `chunk${isHeld ? " held-one" : ""}${chunk.text.includes("\n") ? " broken" : ""}`);
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.tabIndex = chunks.length ? -1 : 0;
    at("chunks").append(span);
    chunks.push({ ...chunk, node: span });
    if (chunk.ends) at("chunks").after(node("span", "the document ends", "end"));
    offer();
  }

  function cut(from) {
    for (const chunk of chunks.splice(from)) chunk.node.remove();
    document.querySelector(".end")?.remove();
    if (chosen >= from) choose(-1);
    hideCandidates();
    offer();
  }

  function barsOf(latent) {
    const most = Math.max(2, ...latent.map(Math.abs));
    at("bars").className = latent.length > 8 ? "bars many" : "bars";
    at("bars").replaceChildren(...latent.map((value) => {
      const row = node("div", "", "bar"), share = (50 * Math.abs(value)) / most;
      const SVG = "http://www.w3.org/2000/svg", svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", "0 0 100 9");
      svg.setAttribute("preserveAspectRatio", "none");
      const bar = document.createElementNS(SVG, "rect"), zero = document.createElementNS(SVG, "line");
      for (const [name, number] of Object.entries({ x: value < 0 ? 50 - share : 50, y: 0, width: share, height: 9 })) bar.setAttribute(name, number);
      for (const [name, number] of Object.entries({ x1: 50, x2: 50, y1: 0, y2: 9 })) zero.setAttribute(name, number);
      svg.append(bar, zero);
      row.append(svg, node("span", value.toFixed(2)));
      return row;
    }));
  }

  function choose(index, hasFocus = false) {
    chosen = index;
    chunks.forEach((chunk, k) => {
      chunk.node.setAttribute("aria-selected", k === index);
      chunk.node.tabIndex = k === Math.max(index, 0) ? 0 : -1;
    });
    at("chosen").hidden = index < 0;
    at("nothing").hidden = index >= 0;
    if (index < 0) return;
    at("what").textContent = chunks[index].text.replaceAll(" ", "␣").replaceAll("\n", "↵");
    barsOf(chunks[index].latent);
    if (hasFocus) chunks[index].node.focus();
  }

  // what can be done now
  function offer() {
    const isBusy = running !== null, hasEnded = chunks.length > 0 && chunks[chunks.length - 1].ends;
    at("stop").disabled = !isBusy;
    at("write").disabled = at("choose").disabled = isBusy || hasEnded;
    for (const id of ["redraw", "same", "instead", "cut"]) if (at(id)) at(id).disabled = isBusy;
  }

  const hideCandidates = () => {
    at("candidates").hidden = true;
    at("candidates").replaceChildren();
  };

  // ---- what is asked of the server
  function call(place, more) {
    const settings = {};
    for (const input of document.querySelectorAll("[data-setting]")) settings[input.id] = input.valueAsNumber;
    return {
      prompt: at("prompt").value,
      chunks: chunks.slice(0, place).map((chunk) => chunk.hex),
      seed: at("seed").valueAsNumber,
      settings,
      ...more,
    };
  }

  async function post(path, body, signal) {
    const wrong = [...document.querySelectorAll("input")].find((input) => !input.checkValidity());
    if (wrong) throw new Error(`${document.querySelector(`label[for="${wrong.id}"]`)?.textContent ?? wrong.id}: ${wrong.validationMessage}`);
    let answer;
    try {
      answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Error("the playground does not answer: is it still running?");
    }
    if (!answer.ok) throw new Error((await answer.json()).error);
    return answer;
  }

  async function* lines(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  }

  // one thing at a time: what runs can be stopped, and says how it went
  async function run(work) {
    if (running) return;
    running = new AbortController();
    complain("");
    showPrompt();
    offer();
    try {
      await work(running.signal);
    } catch (error) {
      if (running.signal.aborted) say(`stopped after ${chunks.length} chunks`);
      else complain(error.message);
    } finally {
      running = null;
      offer();
    }
  }

  const write = (count, first = {}) => run(async (signal) => {
    const more = held ? { latent: held.latent, hold: true, ...first } : first;
    say("writing …");
    hideCandidates();
    let hasEnded = false;
    for await (const line of lines(await post("write", call(chunks.length, { count, ...more }), signal))) {
      if (line.error) throw new Error(line.error);
      if (line.chunk) {
        append(line.chunk);
        say(`writing … ${chunks.length} chunks`);
      }
      if (line.done) {
        hasEnded = true;
        const { chunks: number, characters, seconds } = line.done;
        say(`${number} chunks, ${characters} characters` + (seconds > 0.05 ? `, ${Math.round(characters / seconds)} a second` : ""));
      }
    }
    if (!hasEnded) throw new Error("the playground stopped in the middle: is it still running?");
  });

  const count = () => at("count").valueAsNumber || 1;
  // a chunk again, in its own place; what followed goes
  const again = async (more) => {
    if (chosen < 0 || running) return;
    const place = chosen, draw = chunks[place].draw + 1;
    cut(place);
    await write(at("onward").checked ? count() : 1, { draw, ...more });
    if (chunks.length > place) choose(place, true);
  };
  const redraw = () => again({});
  const same = () => chosen >= 0 && again({ latent: chunks[chosen].latent, hold: false });

  const candidates = (place) => run(async (signal) => {
    const draw = place < chunks.length ? chunks[place].draw + 1 : 0;
    say("drawing candidates …");
    const answer = await post("candidates", call(place, { count: at("many").valueAsNumber, draw, latent: held?.latent ?? null }), signal);
    const found = (await answer.json()).candidates;
    const buttons = found.map((chunk) => {
      const button = node("button", chunk.text.replaceAll(" ", "␣").replaceAll("\n", "↵"));
      button.type = "button";
      button.addEventListener("click", () => {
        cut(place);
        append(chunk);
        choose(place, true);
        say("taken; Write goes on from it");
      });
      return button;
    });
    at("candidates").replaceChildren(node("p", place < chunks.length ? "In its place:" : "The next chunk may be:", "quiet small"), ...buttons);
    at("candidates").hidden = false;
    say(`${found.length} candidates`);
    buttons[0].focus();
  });

  const hold = (chunk) => {
    held = chunk;
    at("held").hidden = !chunk;
    if (chunk) at("held").firstElementChild.textContent = `every chunk is written from the latent of “${chunk.text.replaceAll("\n", "↵")}”`;
  };

  // ---- what the user does
  at("write").addEventListener("click", () => write(count()));
  at("stop").addEventListener("click", () => running?.abort());
  at("choose").addEventListener("click", () => candidates(chunks.length));
  at("clear").addEventListener("click", () => { running?.abort(); cut(0); complain(""); say("cleared"); });
  at("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(at("prompt").value + chunks.map((chunk) => chunk.text).join(""));
      say("copied");
    } catch {
      complain("the browser does not let this page copy: mark the text instead");
    }
  });
  at("prompt").addEventListener("input", showPrompt);
  at("chunks").addEventListener("click", (event) => {
    const index = chunks.findIndex((chunk) => chunk.node === event.target);
    if (index >= 0) choose(index, true);
  });
  at("chunks").addEventListener("focusin", (event) => {
    const index = chunks.findIndex((chunk) => chunk.node === event.target);
    if (index >= 0 && index !== chosen) choose(index);
  });
  const act = { r: redraw, s: () => about.latent_dim && same(), c: () => chosen >= 0 && candidates(chosen), h: () => about.latent_dim && hold(chunks[chosen]), x: () => cut(chosen) };
  const move = { ArrowRight: (k) => k + 1, ArrowLeft: (k) => k - 1, Home: () => 0, End: () => chunks.length - 1 };
  const isPlain = (event) => !(event.ctrlKey || event.metaKey || event.altKey || chosen < 0);
  at("chunks").addEventListener("keydown", (event) => {
    if (!isPlain(event) || !move[event.key]) return;
    event.preventDefault();
    choose(Math.min(Math.max(move[event.key](chosen), 0), chunks.length - 1), true);
  });
  for (const place of [at("chunks"), at("chosen")]) {
    place.addEventListener("keydown", (event) => {
      if (!isPlain(event) || !act[event.key] || running) return;
      event.preventDefault();
      act[event.key]();
    });
  }
  for (const [id, work] of [["redraw", redraw], ["same", same], ["instead", act.c], ["hold", act.h], ["cut", act.x]]) at(id)?.addEventListener("click", () => work());
  at("release")?.addEventListener("click", () => hold(null));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !at("write").disabled) write(count());
  });
  showPrompt();
  offer();
})();
