(() => {
  function start(root, data) {
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const rows = [...part("table").querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]);
    let shown = null; // the cell that is listed

    function make(tag, text = "") {
      const element = document.createElement(tag);
      element.textContent = text;
      return part("top").appendChild(element);
    }

    function show(layer, position) {
      if (shown) shown.classList.remove("chosen");
      shown = rows[layer][position];
      shown.classList.add("chosen");
      const place = `${data.layers[layer]}, after ${position} ${data.tokens[position]}`;
      const colour = data.colours ? `, ${data.colour_title} ${data.colours[layer][position]}` : "";
      part("readout").textContent = place + colour;
      part("top").textContent = "";
      data.top[layer][position].forEach((token, n) => {
        const probability = data.probabilities[layer][position][n];
        make("span", token);
        make("span", probability.toFixed(4));
        make("i").style.width = `${100 * probability}%`;
      });
    }

    rows.forEach((row, layer) => row.forEach((cell, position) => (cell.onmouseenter = () => show(layer, position))));
    show(rows.length - 1, rows[0].length - 1);
  }

  for (const root of document.querySelectorAll(".tljax-lens:not([data-ready])")) {
    root.dataset.ready = "yes";
    start(root, JSON.parse(root.querySelector("script[type='application/json']").textContent));
  }
})();
