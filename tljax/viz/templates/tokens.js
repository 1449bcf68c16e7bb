(() => {
  function start(root, data) {
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const words = [...part("text").children];
    const select = part("select");

    function paint(number) {
      const feature = data.features[number];
      words.forEach((word, n) => {
        [word.style.background, word.style.color] = data.palettes[feature.colours][feature.levels[n]];
        word.title = `${n} ${data.tokens[n]}: ${feature.values[n]}`;
      });
      [...part("legends").children].forEach((legend, n) => (legend.style.display = n === number ? "" : "none"));
    }

    words.forEach((word, n) => {
      const read = (text) => {
        part("readout").textContent = text;
        word.classList.toggle("chosen", text !== "");
      };
      word.onmouseenter = () => read(word.title);
      word.onmouseleave = () => read("");
    });
    if (select) select.onchange = () => paint(Number(select.value));
  }

  for (const root of document.querySelectorAll(".tljax-tokens:not([data-ready])")) {
    root.dataset.ready = "yes";
    start(root, JSON.parse(root.querySelector("script[type='application/json']").textContent));
  }
})();
