"use strict";
// Draws the first eviction from the JSON in the page. A selection is a layer and a KV head; -1
// selects all. Later evictions are tables of the page, which are shown or hidden.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { heads, tokens } = data;
  const layers = data.layers.length;
  const byId = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const kept = bytes(data.kept);
  const isKept = (i) => (kept[i >> 3] >> (7 - (i & 7))) & 1;
  const measures = { attention: measure(data.attention), scores: measure(data.scores) };
  const imageOf = new Int16Array(tokens).fill(-1);
  data.visual.forEach(([first, end], i) => imageOf.fill(i, first, end));
  const state = { eviction: 1, layer: -1, head: -1, view: "kept" };
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)}%`;
  const short = (x) => (x === 0 ? "0" : x >= 1e-3 && x < 1e4 ? x.toPrecision(3) : x.toExponential(1));

  function measure({ levels, low, high }) {
    const values = new Float64Array(256);
    for (let i = 1; i < 256; i++) values[i] = low * (high / low) ** ((i - 1) / 254);
    return { levels: bytes(levels), values, low, high };
  }

  // Rows of the selection: offsets of [layer, head] in the arrays.
  function rows() {
    const result = [];
    for (let l = 0; l < layers; l++)
      for (let h = 0; h < heads; h++)
        if ((state.layer < 0 || l === state.layer) && (state.head < 0 || h === state.head))
          result.push((l * heads + h) * tokens);
    return result;
  }

  // Values to draw: `share` is the fraction of the selection that keeps a token, `value` belongs
  // to the view.
  let current;
  function select() {
    const chosen = rows();
    const share = new Float64Array(tokens);
    for (const row of chosen) for (let t = 0; t < tokens; t++) share[t] += isKept(row + t);
    for (let t = 0; t < tokens; t++) share[t] /= chosen.length;
    const value = { attention: null, scores: null };
    for (const [name, { levels, values }] of Object.entries(measures)) {
      const mean = (value[name] = new Float64Array(tokens));
      for (const row of chosen) {
        // Scores of different heads may have different scales.
        let most = 1;
        if (name === "scores") {
          most = 0;
          for (let t = 0; t < tokens; t++) most = Math.max(most, values[levels[row + t]]);
        }
        if (most > 0) for (let t = 0; t < tokens; t++) mean[t] += values[levels[row + t]] / most;
      }
      for (let t = 0; t < tokens; t++) mean[t] /= chosen.length;
    }
    const shown = state.view === "kept" ? share : value[state.view];
    let most = 0;
    for (let t = 0; t < tokens; t++) if (imageOf[t] >= 0) most = Math.max(most, shown[t]);
    current = { chosen, share, value, shown, most };
  }

  // ---------------------------------------------------------------------------------- images

  const MARKER = 0.38; // opacity over a patch that every selected layer and KV head keeps
  const HEAT = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
  function heat(x) {
    const at = Math.min(x, 1) * (HEAT.length - 1);
    const i = Math.min(Math.floor(at), HEAT.length - 2);
    return HEAT[i].map((low, c) => Math.round(low + (at - i) * (HEAT[i + 1][c] - low)));
  }

  const panels = [...document.querySelectorAll(".panel")].map((figure, index) => {
    const panel = {
      ...data.panels[index], index, figure, cursor: null,
      canvas: figure.querySelector("canvas"), image: figure.querySelector("img"),
    };
    const { kind } = panel;
    figure.classList.toggle("wide", kind !== "overlay");
    figure.querySelector(".note").textContent = {
      overlay: panel.partlySeen ? "Grey at the edges: the model does not see it (cropped away, or padding)." : "",
      tiles: "The model cuts this image into parts. Where they lie in it is not known here: they are drawn side by side, in prompt order.",
      strip: "Where this model's visual tokens lie in the image is not known here: they are drawn in prompt order, line by line, and say nothing of a place.",
    }[kind];
    panel.canvas.style.aspectRatio = `${panel.size[0]} / ${panel.size[1]}`;
    if (kind === "overlay") panel.canvas.style.maxWidth = `${(36 * panel.size[0]) / panel.size[1]}rem`;
    panel.canvas.addEventListener("pointermove", (event) => pointAt(panel, event));
    panel.canvas.addEventListener("pointerleave", () => inspect(panel, null));
    panel.canvas.addEventListener("blur", () => inspect(panel, null));
    panel.canvas.addEventListener("keydown", (event) => step(panel, event));
    return panel;
  });

  function cellRect({ grid: [, gridRows, columns], box: [left, top, width, height] }, row, column, scale) {
    const x = Math.round((left + (column * width) / columns) * scale);
    const y = Math.round((top + (row * height) / gridRows) * scale);
    const right = Math.round((left + ((column + 1) * width) / columns) * scale);
    const bottom = Math.round((top + ((row + 1) * height) / gridRows) * scale);
    return [x, y, right - x, bottom - y];
  }

  function draw(panel) {
    const { canvas, image, picture, kind, cells, size } = panel;
    const width = Math.round(canvas.clientWidth * devicePixelRatio);
    if (!width) return; // another eviction is shown
    const scale = width / size[0];
    const height = Math.round(size[1] * scale);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (kind === "overlay") {
      context.fillStyle = style("--unseen");
      context.fillRect(0, 0, width, height);
    }
    if (picture && image) {
      if (kind === "overlay" && state.view !== "kept") context.filter = "grayscale(1)";
      context.drawImage(image, ...picture.map((x) => x * scale));
      context.filter = "none";
    }
    if (kind === "overlay") hideUnseen(context, cells[0].box.map((x) => x * scale), width, height);
    const veil = style("--veil"), marker = style("--marker"), bare = style("--cell");
    const { shown, most } = current;
    const single = current.chosen.length === 1 && state.view === "kept";
    for (const block of cells) {
      const [first, gridRows, columns, stride] = block.grid;
      const on = (r, c) => r >= 0 && c >= 0 && r < gridRows && c < columns && shown[first + r * stride + c] > 0;
      for (let r = 0; r < gridRows; r++)
        for (let c = 0; c < columns; c++) {
          const x = most > 0 ? shown[first + r * stride + c] / most : 0;
          const rect = cellRect(block, r, c, scale);
          if (kind === "strip" && rect[2] > 6) rect[2] -= 1;
          const fill = (colour) => {
            context.fillStyle = colour;
            context.fillRect(...rect);
          };
          if (state.view !== "kept") fill(`rgba(${heat(Math.sqrt(x))}, ${kind === "overlay" ? 0.4 + 0.4 * Math.sqrt(x) : 1})`);
          else if (kind === "overlay") {
            fill(`rgba(${veil}, ${0.75 * (1 - x)})`);
            fill(`rgba(${marker}, ${MARKER * x})`);
          } else {
            fill(bare);
            fill(`rgba(${marker}, ${x})`);
          }
        }
      if (single && kind !== "strip") outline(context, block, on, scale);
    }
    if (panel.cursor) {
      const rect = cellRect(cells[panel.cursor[0]], panel.cursor[1], panel.cursor[2], scale);
      context.lineWidth = 2 * devicePixelRatio;
      context.strokeStyle = style("--ink");
      context.strokeRect(...rect);
    }
  }

  // Edges between kept and evicted patches of one KV head.
  function outline(context, block, on, scale) {
    context.beginPath();
    const [, gridRows, columns] = block.grid;
    for (let r = 0; r < gridRows; r++)
      for (let c = 0; c < columns; c++) {
        if (!on(r, c)) continue;
        const [x, y, w, h] = cellRect(block, r, c, scale);
        const line = (from, to) => { context.moveTo(...from); context.lineTo(...to); };
        if (!on(r - 1, c)) line([x, y], [x + w, y]);
        if (!on(r + 1, c)) line([x, y + h], [x + w, y + h]);
        if (!on(r, c - 1)) line([x, y], [x, y + h]);
        if (!on(r, c + 1)) line([x + w, y], [x + w, y + h]);
      }
    context.lineWidth = 1.5 * devicePixelRatio;
    context.strokeStyle = style("--visual");
    context.stroke();
  }

  // Areas that the model's preprocessing crops away.
  function hideUnseen(context, [x, y, w, h], width, height) {
    context.fillStyle = "rgba(107, 114, 128, 0.75)";
    const fill = (left, top, right, bottom) => {
      if (right > left && bottom > top) context.fillRect(left, top, right - left, bottom - top);
    };
    const [left, top, right, bottom] = [x, y, x + w, y + h].map(Math.round);
    fill(0, 0, width, top);
    fill(0, bottom, width, height);
    fill(0, top, left, bottom);
    fill(right, top, width, bottom);
  }

  function pointAt(panel, event) {
    const scale = panel.size[0] / panel.canvas.clientWidth;
    const x = event.offsetX * scale, y = event.offsetY * scale;
    let found = null;
    panel.cells.forEach(({ grid: [, gridRows, columns], box: [left, top, width, height] }, i) => {
      const c = Math.floor(((x - left) / width) * columns), r = Math.floor(((y - top) / height) * gridRows);
      if (r >= 0 && c >= 0 && r < gridRows && c < columns) found = [i, r, c];
    });
    inspect(panel, found, [event.clientX, event.clientY]);
  }

  function step(panel, event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") return inspect(panel, null);
    if (!move) return;
    event.preventDefault();
    let [i, r, c] = panel.cursor ?? [0, 0 - move[0], 0 - move[1]];
    r += move[0];
    c += move[1];
    if (r < 0 && i > 0) r = panel.cells[--i].grid[1] - 1;
    else if (r >= panel.cells[i].grid[1] && i + 1 < panel.cells.length) [i, r] = [i + 1, 0];
    const [, gridRows, columns] = panel.cells[i].grid;
    r = Math.max(0, Math.min(r, gridRows - 1));
    c = Math.max(0, Math.min(c, columns - 1));
    const bounds = panel.canvas.getBoundingClientRect();
    const scale = bounds.width / panel.size[0];
    const [x, y, w] = cellRect(panel.cells[i], r, c, scale);
    inspect(panel, [i, r, c], [bounds.left + x + w, bounds.top + y]);
  }

  // Shows the tooltip of one token; null hides it.
  function inspect(panel, cursor, at) {
    const before = String(panel.cursor);
    panel.cursor = cursor;
    const tip = byId("tip");
    tip.hidden = !cursor;
    if (cursor) {
      const [i, r, c] = cursor;
      const [first, , , stride] = panel.cells[i].grid;
      const token = first + r * stride + c;
      const place = { overlay: `row ${r}, column ${c}`, tiles: `part ${i + 1}, row ${r}, column ${c}`, strip: `token ${token - data.visual[panel.index][0]} of the image` }[panel.kind];
      const count = Math.round(current.share[token] * current.chosen.length);
      tip.textContent = `${place}, position ${token}\nkept by ${count} of ${current.chosen.length} (layers × KV heads)\nattention ${short(current.value.attention[token])}, score ${percent(current.value.scores[token], 1)} of the highest`;
      tip.style.left = `${Math.max(4, Math.min(at[0] + 14, innerWidth - tip.offsetWidth - 8))}px`;
      const below = at[1] + 18;
      tip.style.top = `${below + tip.offsetHeight > innerHeight ? at[1] - tip.offsetHeight - 10 : below}px`;
      panel.canvas.setAttribute("aria-label", `Image ${panel.index + 1}: ${tip.textContent}`);
    }
    if (before !== String(cursor)) draw(panel);
  }

  function imageCounts() {
    for (const panel of panels) {
      const [first, end] = data.visual[panel.index];
      let sum = 0;
      for (let t = first; t < end; t++) sum += current.share[t];
      const mean = current.chosen.length > 1 ? " on average" : "";
      const text = `${Number(sum.toFixed(1))} of ${end - first} tokens kept${mean}`;
      panel.figure.querySelector(".count").textContent = text;
      panel.canvas.setAttribute("aria-label", `Image ${panel.index + 1}: ${text}`);
    }
  }

  function legend() {
    if (!panels.length) return;
    const overlay = panels.some(({ kind }) => kind === "overlay");
    const ramp = Array.from({ length: 12 }, (_, i) => i / 11);
    const { view } = state;
    const stops = view === "kept"
      ? overlay ? [`rgba(${style("--veil")}, .75)`, `rgba(${style("--marker")}, ${MARKER})`] : [style("--cell"), `rgb(${style("--marker")})`]
      : ramp.map((x) => `rgb(${heat(Math.sqrt(x))})`);
    byId("legend-bar").style.background = `linear-gradient(90deg, ${stops}) white`;
    byId("legend-low").textContent = view === "kept" ? "0%" : "0";
    byId("legend-high").textContent = view === "attention" ? short(current.most) : percent(current.most);
    byId("legend-text").textContent = {
      kept: "of the selected layers × KV heads keep the token; evicted patches are dimmed",
      attention: "attention received, mean over the selection; the colour scale uses the square root",
      scores: "relative to the highest score of the KV head, mean over the selection; the colour scale uses the square root",
    }[view];
  }

  // ---------------------------------------------------------------------------------- layers

  function make(tag, className, parent) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    parent.append(element);
    return element;
  }

  const bars = byId("bars");
  const most = Math.max(...data.keptTokens);
  const tick = niceStep(most / 4);
  const top = Math.ceil(most / tick) * tick;
  for (let y = 0; y <= top; y += tick) {
    const rule = make("div", "rule", bars);
    rule.style.bottom = percent(y / top, 3).replace(" ", "");
    make("span", "", rule).textContent = y;
  }
  make("div", "axis", bars).textContent = "layer";
  const columns = make("div", "columns", bars);
  const mean = data.keptTokens.reduce((a, b) => a + b, 0) / layers;
  make("div", "rule mean", bars).style.bottom = `${(100 * mean) / top}%`;
  const buttons = data.keptTokens.map((count, layer) => {
    const button = make("button", "", columns);
    button.type = "button";
    button.tabIndex = -1; // keyboard users select a layer with the slider
    let visual = 0;
    for (let h = 0; h < heads; h++)
      for (let t = 0, row = (layer * heads + h) * tokens; t < tokens; t++) visual += imageOf[t] >= 0 ? isKept(row + t) : 0;
    visual /= heads;
    button.title = `layer ${data.layers[layer]}: ${count} tokens kept per KV head, ${visual.toFixed(1)} visual, ${(count - visual).toFixed(1)} text; density ${data.density[layer].toFixed(3)}`;
    const stack = make("span", "stack", button);
    stack.style.height = `${(100 * count) / top}%`;
    make("i", "text", stack).style.flexGrow = count - visual;
    make("i", "visual", stack).style.flexGrow = visual;
    if (layer % Math.ceil(layers / 40) === 0) make("span", "name", button).textContent = data.layers[layer];
    button.addEventListener("click", () => {
      state.layer = state.layer === layer ? -1 : layer;
      update();
    });
    return button;
  });

  function niceStep(least) {
    const power = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
    return [1, 2, 5, 10].map((x) => x * power).find((x) => x >= least);
  }

  // ------------------------------------------------------------------------------- histograms

  const SVG = "http://www.w3.org/2000/svg";
  function svg(tag, attributes, parent, text) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function histogram(name) {
    const { levels, low, high } = measures[name];
    const BINS = 32, per = 255 / BINS;
    const counts = { kept: new Float64Array(BINS + 1), evicted: new Float64Array(BINS + 1) };
    const sums = { kept: 0, evicted: 0 };
    for (const row of current.chosen)
      for (let t = 0; t < tokens; t++) {
        const group = isKept(row + t) ? "kept" : "evicted";
        const level = levels[row + t];
        counts[group][level === 0 ? 0 : 1 + Math.min(BINS - 1, Math.floor((level - 1) / per))]++;
        sums[group]++;
      }
    for (const group of ["kept", "evicted"]) for (let i = 0; i <= BINS; i++) counts[group][i] /= Math.max(1, sums[group]);
    const highest = Math.max(...counts.kept, ...counts.evicted);
    const box = byId(`${name}-histogram`);
    const W = 560, H = 230, left = 44, right = 12, base = H - 26, topY = 10;
    const zeros = counts.kept[0] + counts.evicted[0] > 0;
    const start = left + (zeros ? 34 : 0);
    const x = (bin) => start + ((W - right - start) * bin) / BINS;
    const y = (share) => base - (base - topY) * (share / highest);
    const means = ["kept", "evicted"].map((g) => `${g}: ${sums[g]} tokens`).join(", ");
    const root = document.createElementNS(SVG, "svg");
    root.setAttribute("viewBox", `0 0 ${W} ${H}`);
    root.setAttribute("role", "img");
    root.setAttribute("aria-label", `Histogram of ${name}, ${means}, from ${short(low)} to ${short(high)}`);
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25].find((s) => highest / s <= 5) ?? 0.25;
    for (let share = 0; share <= highest; share += step) {
      svg("line", { class: "grid", x1: left, x2: W - right, y1: y(share), y2: y(share) }, root);
      svg("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, root, percent(share));
    }
    const decades = Math.log10(high / low);
    if (decades > 0) {
      const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
      const every = Math.ceil((last - first + 1) / 6);
      for (let d = first; d <= last; d += every) {
        const at = x((BINS * (d - Math.log10(low))) / decades);
        svg("line", { class: "grid", x1: at, x2: at, y1: base, y2: base + 4 }, root);
        const label = svg("text", { x: at, y: base + 18, "text-anchor": "middle" }, root, d >= -2 && d <= 3 ? String(10 ** d) : "");
        if (!label.textContent) {
          label.append("10");
          svg("tspan", { dy: -4, "font-size": 9 }, label, d);
        }
      }
    }
    if (zeros) svg("text", { x: left + 11, y: base + 18, "text-anchor": "middle" }, root, "0");
    for (const group of ["evicted", "kept"]) {
      let path = `M${x(0)} ${base}`;
      for (let i = 0; i < BINS; i++) path += `L${x(i)} ${y(counts[group][i + 1])}L${x(i + 1)} ${y(counts[group][i + 1])}`;
      svg("path", { class: group, d: `${path}L${x(BINS)} ${base}Z` }, root);
      if (zeros) svg("rect", { class: group, x: left + (group === "kept" ? 12 : 2), width: 9, y: y(counts[group][0]), height: base - y(counts[group][0]) }, root);
    }
    box.replaceChildren(root);
  }

  // ----------------------------------------------------------------------------------- prompt

  const tokenBox = byId("tokens");
  const chips = [];
  for (let t = 0, text = 0; t < tokens; ) {
    const chip = make("span", "", tokenBox);
    if (imageOf[t] >= 0) {
      const end = data.visual[imageOf[t]][1];
      chip.className = "image";
      chips.push({ chip, first: t, end, name: `image ${imageOf[t] + 1}` });
      t = end;
    } else {
      const content = data.texts[text++];
      for (const part of content.split(/(\n)/)) {
        if (part === "\n") make("span", "newline", chip).textContent = "⏎\n";
        else chip.append(part);
      }
      if (!content) chip.textContent = "·";
      chips.push({ chip, first: t, end: ++t });
    }
  }

  function promptTokens() {
    for (const { chip, first, end, name } of chips) {
      const share = current.share[first];
      if (name) {
        let sum = 0;
        for (let t = first; t < end; t++) sum += current.share[t];
        chip.textContent = `${name}: ${Number(sum.toFixed(1))} of ${end - first} kept`;
        continue;
      }
      chip.className = share > 0 ? "kept" : "gone";
      chip.style.setProperty("--share", share);
      chip.title = `position ${first}: kept by ${Math.round(share * current.chosen.length)} of ${current.chosen.length}`;
    }
  }

  // ------------------------------------------------------------------------------------ state

  const evictions = [...document.querySelectorAll("[name=eviction]")];
  const parts = [...document.querySelectorAll("[data-eviction]")];

  function update() {
    for (const radio of evictions) radio.checked = Number(radio.value) === state.eviction;
    for (const part of parts) part.hidden = Number(part.dataset.eviction) !== state.eviction;
    select();
    const layer = byId("layer");
    layer.value = state.layer + 1;
    const layerName = state.layer < 0 ? "all" : String(data.layers[state.layer]);
    byId("layer-name").textContent = layerName;
    layer.setAttribute("aria-valuetext", state.layer < 0 ? "all layers" : `layer ${layerName}`);
    byId("head").value = state.head;
    document.querySelector(`[name=view][value=${state.view}]`).checked = true;
    buttons.forEach((button, i) => button.toggleAttribute("aria-current", i === state.layer));
    let visual = 0, text = 0;
    for (let t = 0; t < tokens; t++) imageOf[t] >= 0 ? (visual += current.share[t]) : (text += current.share[t]);
    const which = `${state.layer < 0 ? "All layers" : `Layer ${layerName}`}, ${state.head < 0 ? "all KV heads" : `KV head ${state.head}`}`;
    const average = current.chosen.length > 1 ? " on average" : "";
    byId("summary").textContent = `${which}: ${Math.round(visual + text)} of ${tokens} tokens kept${average}, ${Number(visual.toFixed(1))} visual, ${Number(text.toFixed(1))} text`;
    panels.forEach(draw);
    imageCounts();
    legend();
    histogram("attention");
    histogram("scores");
    promptTokens();
    const eviction = state.eviction === 1 ? "" : `eviction=${state.eviction}&`;
    const hash = `#${eviction}layer=${layerName}&head=${state.head < 0 ? "all" : state.head}&view=${state.view}`;
    if (location.hash !== hash) history.replaceState(null, "", hash);
  }

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    const index = (name, numbers) => numbers.map(String).indexOf(given.get(name));
    state.eviction = Math.max(1, 1 + evictions.findIndex(({ value }) => value === given.get("eviction")));
    state.layer = index("layer", data.layers);
    state.head = index("head", [...Array(heads).keys()]);
    state.view = ["kept", "attention", "scores"].includes(given.get("view")) ? given.get("view") : "kept";
  }

  byId("layer").addEventListener("input", (event) => { state.layer = Number(event.target.value) - 1; update(); });
  byId("head").addEventListener("change", (event) => { state.head = Number(event.target.value); update(); });
  byId("selection").addEventListener("submit", (event) => event.preventDefault());
  for (const radio of document.querySelectorAll("[name=view]"))
    radio.addEventListener("change", (event) => { state.view = event.target.value; update(); });
  for (const radio of evictions)
    radio.addEventListener("change", () => { state.eviction = Number(radio.value); update(); });
  addEventListener("hashchange", () => { readHash(); update(); });
  const redraw = () => { panels.forEach(draw); legend(); };

  readHash();
  Promise.all([...document.images].map((image) => image.decode())).then(() => {
    update();
    new ResizeObserver(redraw).observe(document.body);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  });
})();
