(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function make(parent, tag, text = "", kind = "") {
    const element = document.createElement(tag);
    element.textContent = text;
    if (kind) element.className = kind;
    return parent.appendChild(element);
  }

  function draw(parent, tag, attributes, text = "") {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return parent.appendChild(element);
  }

  const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
  const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : "") + short(value));
  const share = (value) => (value === 0 ? "0 %" : `${Number((100 * value).toPrecision(3))} %`);

  function start(root, data) {
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const byNumber = new Map(data.features.map((feature) => [feature.feature, feature]));
    let shown = null;
    let chosen = null; // the token that is read

    function histogram(title, chart, own, format) {
      const [width, height, base] = [250, 84, 68];
      const figure = make(part("charts"), "figure");
      make(figure, "figcaption", title);
      const svg = draw(figure, "svg", { width, height, role: "img", "aria-label": title });
      const { counts, edges } = chart;
      const most = Math.max(1, ...counts);
      const step = width / counts.length;
      counts.forEach((count, n) => {
        const last = n === counts.length - 1;
        const inside = own !== null && own >= edges[n] && (own < edges[n + 1] || (last && own <= edges[n + 1]));
        const tall = count ? Math.max(1.5, (base * count) / most) : 0;
        const place = { x: n * step + 0.5, y: base - tall, width: Math.max(step - 1, 0.5), height: tall };
        const bar = draw(svg, "rect", inside ? { ...place, class: "own" } : place);
        draw(bar, "title", {}, `${format(edges[n])} to ${format(edges[n + 1])}: ${count}`);
      });
      draw(svg, "line", { x1: 0, y1: base + 0.5, x2: width, y2: base + 0.5 });
      draw(svg, "text", { x: 0, y: base + 13 }, format(edges[0]));
      draw(svg, "text", { x: width, y: base + 13, "text-anchor": "end" }, format(edges[edges.length - 1]));
      draw(svg, "text", { x: width / 2, y: base + 13, "text-anchor": "middle" }, `highest bar ${most}`);
    }

    function table(title, rows, format, isFeature) {
      if (!rows.length) return;
      const element = make(part("tables"), "table");
      make(element, "caption", title);
      for (const [name, value] of rows) {
        const row = make(element, "tr");
        const cell = make(row, "td", isFeature ? "" : name);
        if (isFeature && byNumber.has(name)) make(cell, "button", name).onclick = () => show(name);
        else if (isFeature) cell.textContent = name;
        make(row, "td", format(value));
      }
    }

    function example(parent, one, largest) {
      const row = make(parent, "div", "", "example");
      const loss = one.losses === null ? null : one.losses[one.peak];
      const effect = loss === null ? "" : ` (loss ${signed(loss)})`;
      make(row, "div", `prompt ${one.prompt}, token ${one.start + one.peak}: ${short(one.values[one.peak])}${effect}`, "place").title = effect && "change of the next token's loss when the feature is ablated";
      const text = make(row, "div", "", "text");
      one.text.forEach((token, n) => {
        const word = make(text, "span", token, n === one.peak ? "peak" : "");
        const level = Math.round(100 * Math.min(1, Math.abs(one.values[n]) / largest));
        [word.style.background, word.style.color] = data.palette[level];
        const change = one.losses === null || one.losses[n] === null ? "" : `; next token's loss without the feature ${signed(one.losses[n])} nats`;
        word.title = `${one.start + n} ${one.tokens[n]}: ${short(one.values[n])}${change}`;
        word.onmouseenter = () => {
          if (chosen) chosen.classList.remove("chosen");
          chosen = word;
          word.classList.add("chosen");
          part("readout").textContent = word.title;
        };
      });
    }

    function show(number) {
      const feature = byNumber.get(number);
      shown = number;
      chosen = null;
      for (const name of ["facts", "charts", "tables", "groups"]) part(name).textContent = "";
      part("readout").textContent = "Point at a token to read its activation.";
      part("name").textContent = `feature ${feature.feature}`;
      const facts = [
        `active at ${share(feature.density)} of ${feature.n_tokens} tokens`,
        `largest ${short(feature.largest)}, mean ${short(feature.mean)} where active`,
        `decoder norm ${short(feature.decoder_norm)}`,
      ];
      if (feature.cosine !== null) facts.push(`encoder·decoder cosine ${short(feature.cosine)}`);
      if (feature.ablation !== null) facts.push(`ablation: loss ${signed(feature.ablation)} nats after its strongest tokens`);
      facts.forEach((fact) => make(part("facts"), "span", fact));
      const own = feature.density > 0 ? Math.log10(feature.density) : null;
      histogram(`density of all ${data.d_sae} features, log10 (${data.dead} never active)`, data.densities, own, short);
      if (feature.density > 0) histogram("activations", feature.activations, null, short);
      if (feature.logits) histogram("effects on logits", feature.logits, null, short);
      table("raises the logits of", feature.promoted, signed, false);
      table("lowers the logits of", feature.suppressed, signed, false);
      table("decoder cosine", feature.similar, short, true);
      table("correlation", feature.correlated, short, true);
      if (!feature.groups.length) make(part("groups"), "div", "It is not active on these prompts.", "note");
      for (const group of feature.groups) {
        const head = make(part("groups"), "div", "", "heading");
        head.textContent = group.is_top ? "largest activations, one of a prompt" : `activations from ${group.name}: ${share(group.share)} of them`;
        group.examples.forEach((one) => example(part("groups"), one, feature.top));
      }
      if (part("list")) for (const button of part("list").children) button.setAttribute("aria-current", Number(button.dataset.feature) === number);
    }

    function list() {
      const words = part("search").value.trim().toLowerCase();
      const key = part("sort").value;
      const found = data.features.filter((feature) => String(feature.feature) === words || feature.search.includes(words));
      const value = (feature) => (feature[key] === null ? -Infinity : feature[key]);
      found.sort((one, other) => (key === "feature" ? one.feature - other.feature : value(other) - value(one) || one.feature - other.feature));
      part("list").textContent = "";
      part("found").textContent = `${found.length} of ${data.features.length} features`;
      for (const feature of found) {
        const button = make(part("list"), "button");
        button.dataset.feature = feature.feature;
        button.setAttribute("aria-current", feature.feature === shown);
        make(button, "b", feature.feature);
        make(button, "span", feature.label);
        make(button, "i", key === "feature" || key === "density" ? share(feature.density) : short(feature[key]));
        button.onclick = () => show(feature.feature);
      }
      return found;
    }

    if (part("search")) {
      part("search").oninput = list;
      part("sort").onchange = list;
      show(list()[0].feature);
    } else {
      show(data.features[0].feature);
    }
  }

  for (const root of document.querySelectorAll(".tljax-features:not([data-ready])")) {
    root.dataset.ready = "yes";
    start(root, JSON.parse(root.querySelector("script[type='application/json']").textContent));
  }
})();
