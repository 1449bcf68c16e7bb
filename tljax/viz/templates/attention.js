(() => {
  // Thousandths of attention from a token to another; zeros at the end of a row are left out.
  const between = (data, head, query, key) => data.attention[head][query][key] ?? 0;
  const level = (thousandths) => Math.round(thousandths / 10);

  function make(parent, tag, text = "") {
    const element = document.createElement(tag);
    element.textContent = text;
    return parent.appendChild(element);
  }

  function draw(canvas, data, head) {
    const size = data.tokens.length;
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    const image = context.createImageData(size, size);
    const colours = data.palette.map(([hex]) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16)));
    for (let query = 0; query < size; query++) {
      for (let key = 0; key < size; key++) {
        const colour = colours[level(between(data, head, query, key))];
        image.data.set([...colour, 255], 4 * (query * size + key));
      }
    }
    context.putImageData(image, 0, 0);
  }

  // The head shown large: the tokens of the queries to its left, those of the keys below it.
  function large(parent, data) {
    const size = data.tokens.length;
    const cell = Math.max(12, Math.min(28, Math.floor(480 / size)));
    parent.style.fontSize = `${Math.min(13, cell - 2)}px`;
    parent.style.lineHeight = `${cell}px`;
    const rows = make(parent, "div");
    const canvas = make(parent, "canvas");
    const corner = make(parent, "div");
    const keys = make(parent, "div");
    [rows.className, corner.className, keys.className] = ["rows side", "side below", "keys below"];
    canvas.style.width = canvas.style.height = `${cell * size}px`;
    for (const token of data.tokens) {
      make(rows, "div", token).style.height = `${cell}px`;
      make(keys, "div", token).style.width = `${cell}px`;
    }
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      const index = (offset) => Math.max(0, Math.min(size - 1, Math.floor(offset / cell)));
      return { query: index(event.clientY - box.top), key: index(event.clientX - box.left) };
    };
    return { canvas, rows, keys, place };
  }

  function start(root, data) {
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const chosen = { head: 0, query: data.tokens.length - 1, key: null }; // what was clicked
    let drawn = null; // the head on the large canvas
    const one = large(part("large"), data);
    const words = data.text.map((text) => make(part("text"), "span", text));
    const heads = data.heads.length > 1 ? data.heads.map((name) => make(part("heads"), "button", name)) : [];
    const mark = (elements, index, name = "chosen") =>
      [...elements].forEach((element, n) => element.classList.toggle(name, n === index));

    // Shows what is chosen, but for what the mouse is on.
    function show(hovered = {}) {
      const { head, query, key } = { ...chosen, ...hovered };
      if (head !== drawn) draw(one.canvas, data, head);
      drawn = head;
      words.forEach((word, n) => {
        [word.style.background, word.style.color] = data.palette[level(between(data, head, query, n))];
      });
      mark(words, query);
      mark(heads, chosen.head);
      mark(heads, head, "shown");
      mark(one.rows.children, query);
      mark(one.keys.children, key);
      const name = data.heads[head] && `${data.heads[head]}: `;
      const from = `${name}${query} ${data.tokens[query]} → `;
      const value = () => (between(data, head, query, key) / 1000).toFixed(3);
      part("readout").textContent = from + (key === null ? "…" : `${key} ${data.tokens[key]}: ${value()}`);
    }

    function react(element, choice) {
      element.onmouseenter = element.onfocus = () => show(choice);
      element.onmouseleave = element.onblur = () => show();
      element.onclick = () => show(Object.assign(chosen, choice));
    }

    words.forEach((word, query) => react(word, { query }));
    heads.forEach((button, head) => {
      react(button, { head });
      const canvas = button.insertBefore(document.createElement("canvas"), button.firstChild);
      canvas.style.imageRendering = data.tokens.length > 96 ? "auto" : "pixelated";
      draw(canvas, data, head);
    });
    one.canvas.onmousemove = (event) => show(one.place(event));
    one.canvas.onmouseleave = () => show();
    one.canvas.onclick = (event) => show(Object.assign(chosen, { query: one.place(event).query }));
    part("note").textContent = "Rows are queries, columns keys. Move over a head, a cell or a token; click to keep it.";
    show();
  }

  for (const root of document.querySelectorAll(".tljax-attention:not([data-ready])")) {
    root.dataset.ready = "yes";
    start(root, JSON.parse(root.querySelector("script[type='application/json']").textContent));
  }
})();
