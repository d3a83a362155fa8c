// What moves in a report: the chosen chunk, the map, the walk of a latent, the axis of the curves.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const source = at("data");
  const data = source ? JSON.parse(source.textContent) : { passage: null, map: null, paths: [] };
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, attributes = {}, text = "") => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  };
  const html = (tag, text = "", name = "") => {
    const node = document.createElement(tag);
    node.textContent = text;
    if (name) node.className = name;
    return node;
  };

  // ---- the axis of the curves
  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll("[data-axis]")) other.setAttribute("aria-pressed", other === button);
      for (const figure of document.querySelectorAll(".charts figure")) {
        const charts = [...figure.querySelectorAll("[data-axis-of]")];
        const chosen = charts.find((chart) => chart.dataset.axisOf === button.dataset.axis) ?? charts[0];
        for (const chart of charts) chart.toggleAttribute("data-shown", chart === chosen);
      }
    });
  }

  // ---- a plane of latents: the map, and the walk drawn over it
  const WIDTH = 900, HEIGHT = 560, ROOM = 46;
  function planeOf(map, host, label, extra = []) {
    const all = [...map.points, ...extra];
    const span = (key) => [Math.min(...all.map((p) => p[key])), Math.max(...all.map((p) => p[key]))];
    const [x0, x1] = span("x"), [y0, y1] = span("y");
    const x = (p) => ROOM + ((p.x - x0) / Math.max(x1 - x0, 1e-9)) * (WIDTH - 2 * ROOM);
    const y = (p) => HEIGHT - ROOM - ((p.y - y0) / Math.max(y1 - y0, 1e-9)) * (HEIGHT - 2 * ROOM);
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
    const dots = make("g");
    for (const point of map.points) dots.append(make("circle", { cx: x(point).toFixed(1), cy: y(point).toFixed(1), r: 3 }));
    svg.append(dots);
    host.append(svg);
    return { svg, dots, x, y };
  }

  let pick = () => {};
  if (data.map) {
    const { points } = data.map, host = at("plane");
    const { svg, dots, x, y } = planeOf(data.map, host, "Latents of chunks on their two principal axes; arrow keys move from chunk to chunk");
    svg.setAttribute("tabindex", "0");
    // names of as many chunks as find room, the first of the text first
    const taken = [], names = make("g");
    for (const point of points) {
      const wide = 6.4 * point.text.length + 6, box = [x(point) + 5, y(point) - 8, x(point) + 5 + wide, y(point) + 7];
      const isFree = box[2] < WIDTH && taken.every((b) => box[2] < b[0] || box[0] > b[2] || box[3] < b[1] || box[1] > b[3]);
      if (!isFree) continue;
      taken.push(box);
      names.append(make("text", { x: box[0].toFixed(1), y: (box[3] - 4).toFixed(1) }, point.text));
    }
    svg.append(names);
    const picked = make("g", { class: "picked" });
    svg.append(picked);
    let chosen = -1;
    const choose = (index) => {
      chosen = index;
      const point = points[index], isRight = x(point) > WIDTH - 180;
      picked.replaceChildren(
        make("circle", { cx: x(point), cy: y(point), r: 6 }),
        make("text", { x: x(point) + (isRight ? -9 : 9), y: y(point) + 4, "text-anchor": isRight ? "end" : "start" }, `${point.text}  ${point.bits} bits`),
      );
      svg.setAttribute("aria-label", `Latents of chunks; chosen: ${point.text}, ${point.bits} bits`);
    };
    pick = (text) => {
      const index = points.findIndex((point) => point.text === text);
      if (index >= 0) choose(index);
    };
    const nearestTo = (px, py, allowed) => {
      let best = -1, least = Infinity;
      points.forEach((point, index) => {
        const distance = (x(point) - px) ** 2 + (y(point) - py) ** 2;
        if (distance < least && allowed(point, index)) [best, least] = [index, distance];
      });
      return best;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = WIDTH / box.width;
      choose(nearestTo((event.clientX - box.left) * scale, (event.clientY - box.top) * scale, () => true));
    });
    const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    svg.addEventListener("keydown", (event) => {
      const way = WAYS[event.key];
      if (!way) return;
      event.preventDefault();
      const from = points[Math.max(chosen, 0)];
      const next = nearestTo(x(from), y(from), (point, index) => {
        const dx = x(point) - x(from), dy = y(point) - y(from);
        return index !== chosen && dx * way[0] + dy * way[1] > Math.abs(dx * way[1] + dy * way[0]);
      });
      if (next >= 0) choose(next);
    });
    svg.addEventListener("focus", () => { if (chosen < 0) choose(0); });
    at("find").addEventListener("input", (event) => {
      const wanted = event.target.value.replaceAll(" ", "␣");
      let count = 0;
      points.forEach((point, index) => {
        const isFound = wanted !== "" && point.text.includes(wanted);
        dots.children[index].setAttribute("class", isFound ? "found" : "");
        count += isFound;
      });
      at("found").textContent = wanted ? `${count} of ${points.length}` : "";
    });
  }

  // ---- the passage
  const chunks = [...document.querySelectorAll(".chunk")];
  if (data.passage) {
    const most = Math.max(1, ...data.passage.flatMap((chunk) => chunk.mu.map(Math.abs)));
    const show = (index) => {
      const chunk = data.passage[index], box = at("detail"), facts = html("dl");
      const fact = (name, value) => facts.append(html("dt", name), html("dd", value));
      const all = chunk.latent + chunk.decoder;
      box.replaceChildren(html("p", `chunk ${index + 1} of ${data.passage.length}`, "quiet small"), html("p", chunk.label, "what"), facts);
      fact("bits", all.toFixed(2) + (chunk.mu.length ? ` = ${chunk.latent.toFixed(2)} latent + ${chunk.decoder.toFixed(2)} decoder` : ""));
      fact("a character", (all / Math.max(chunk.characters, 1)).toFixed(2));
      if (chunk.other !== undefined) fact("the other run", `${chunk.other.toFixed(2)} bits`);
      if (chunk.mu.length) {
        const bars = html("div", "", chunk.mu.length > 16 ? "bars many" : "bars");
        for (const value of chunk.mu) {
          const row = html("div", "", "bar"), track = html("i"), fill = html("b"), share = (50 * Math.abs(value)) / most;
          fill.style.left = `${value < 0 ? 50 - share : 50}%`;
          fill.style.width = `${share}%`;
          track.append(fill);
          row.append(track, html("span", value.toFixed(2)));
          bars.append(row);
        }
        const near = html("ol");
        for (const other of chunk.near) {
          const line = html("li");
          line.append(html("span", other.text), html("span", other.distance.toFixed(2)));
          near.append(line);
        }
        box.append(html("h3", "latent"), bars, html("h3", "nearest chunks, distance"), near);
      }
      pick(chunk.label);
    };
    const select = (index, isKey) => {
      for (const chunk of chunks) {
        const isIt = +chunk.dataset.index === index;
        chunk.setAttribute("aria-selected", isIt);
        chunk.tabIndex = isIt ? 0 : -1;
        if (isIt && isKey) chunk.focus();
      }
      show(index);
    };
    const list = at("chunks");
    list.addEventListener("pointerover", (event) => {
      const chunk = event.target.closest(".chunk");
      if (chunk) select(+chunk.dataset.index, false);
    });
    list.addEventListener("focusin", (event) => select(+event.target.dataset.index, false));
    list.addEventListener("keydown", (event) => {
      const now = +(document.activeElement.dataset.index ?? 0), last = chunks.length - 1;
      const lines = () => {
        const tops = chunks.map((chunk) => chunk.getBoundingClientRect());
        const here = tops[now], down = event.key === "ArrowDown" ? 1 : -1;
        let best = now, least = Infinity;
        tops.forEach((box, index) => {
          const rise = (box.top - here.top) * down;
          const cost = rise * 4 + Math.abs(box.left - here.left);
          if (rise > 4 && cost < least) [best, least] = [index, cost];
        });
        return best;
      };
      const next = { ArrowRight: () => Math.min(now + 1, last), ArrowLeft: () => Math.max(now - 1, 0), Home: () => 0, End: () => last, ArrowDown: lines, ArrowUp: lines }[event.key];
      if (!next) return;
      event.preventDefault();
      select(next(), true);
    });
    select(0, false);
  }

  // ---- the walk of one latent
  if (data.map && data.paths.length) {
    const host = at("walk"), { mean, axes } = data.map;
    const project = (z) => {
      const of = (axis) => axis.reduce((sum, weight, k) => sum + weight * (z[k] - mean[k]), 0);
      return { x: of(axes[0]), y: of(axes[1]) };
    };
    const walks = data.paths.map((path) => path.steps.map((step) => ({ ...project(step.z), guess: project(step.guess) })));
    const extra = walks.flat().flatMap((step) => [step, step.guess]);
    const { svg, dots, x, y } = planeOf(data.map, host, "The latent's walk over the map", extra);
    dots.setAttribute("class", "faint");
    const ahead = make("polyline", { class: "ahead" }), trail = make("polyline", { class: "trail" });
    const guess = make("circle", { class: "guess", r: 9 }), now = make("circle", { class: "now", r: 6 });
    svg.append(ahead, trail, guess, now);
    const slider = at("step"), play = at("play"), body = at("frames");
    let path = 0, timer = 0;
    const line = (steps) => steps.map((p) => `${x(p).toFixed(1)},${y(p).toFixed(1)}`).join(" ");
    const draw = () => {
      const step = +slider.value, walk = walks[path], { steps } = data.paths[path], here = walk[step];
      ahead.setAttribute("points", line(walk));
      trail.setAttribute("points", line(walk.slice(0, step + 1)));
      for (const [node, p] of [[now, here], [guess, here.guess]]) {
        node.setAttribute("cx", x(p).toFixed(1));
        node.setAttribute("cy", y(p).toFixed(1));
      }
      at("becomes").textContent = steps[step].text;
      at("at").textContent = `step ${step} of ${steps.length - 1}, log SNR ${steps[step].log_snr.toFixed(2)}`;
      [...body.children].forEach((row, index) => {
        row.setAttribute("aria-current", index === step);
        if (index === step) body.parentElement.parentElement.scrollTop = row.offsetTop - 120;
      });
    };
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
      play.setAttribute("aria-pressed", "false");
    };
    const choosePath = () => {
      path = +at("which").value;
      const { context, steps } = data.paths[path];
      at("before").textContent = `… ${context}`;
      at("truth").textContent = data.paths[path].true || "nothing more";
      body.replaceChildren(...steps.map((step, index) => {
        const row = html("tr");
        row.append(html("td", index), html("td", step.log_snr.toFixed(2)), html("td", step.text));
        row.addEventListener("click", () => { stop(); slider.value = index; draw(); });
        return row;
      }));
      slider.max = steps.length - 1;
      draw();
    };
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (slider.value === slider.max) slider.value = 0;
      play.textContent = "Pause";
      play.setAttribute("aria-pressed", "true");
      timer = setInterval(() => {
        slider.value = +slider.value + 1;
        draw();
        if (slider.value === slider.max) stop();
      }, 220);
    });
    slider.addEventListener("input", () => { stop(); draw(); });
    at("which").addEventListener("change", () => { stop(); slider.value = 0; choosePath(); });
    slider.value = slider.max;
    choosePath();
  }
})();
