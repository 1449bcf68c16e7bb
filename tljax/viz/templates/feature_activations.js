(() => {
  function start(root, data) {
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const words = [...part("text").children];
    const select = part("select");
    const largest = Math.max(1e-30, ...data.features.map((feature) => Math.abs(feature.largest)));
    const strength = (n) => (data.active[n].length ? Math.abs(data.active[n][0][1]) : 0);
    let kept = words.reduce((best, _, n) => (strength(n) > strength(best) ? n : best), 0); // the token that is listed

    function make(tag, text) {
      const element = document.createElement(tag);
      element.textContent = text;
      return part("top").appendChild(element);
    }

    function read(n) {
      words.forEach((word, other) => word.classList.toggle("chosen", other === n));
      const count = data.counts[n];
      const strongest = data.active[n].slice(0, data.k);
      const listed = strongest.length < count ? `, the strongest ${strongest.length} listed` : "";
      part("readout").textContent = `${n} ${data.tokens[n]}: ${count} feature${count === 1 ? "" : "s"} active${listed}`;
      part("top").textContent = "";
      for (const [number, value] of strongest) {
        make("button", data.features[number].name).onclick = () => {
          select.value = String(number);
          paint();
        };
        make("span", String(value));
        make("i", "").style.width = `${(100 * Math.abs(value)) / largest}%`;
      }
    }

    function paint() {
      const number = select.value === "" ? null : Number(select.value);
      const most = number === null ? largest : Math.abs(data.features[number].largest);
      words.forEach((word, n) => {
        const own = data.active[n].find(([feature]) => number === null || feature === number);
        const value = own ? own[1] : 0;
        [word.style.background, word.style.color] = data.palette[Math.round((100 * Math.abs(value)) / (most || 1))];
        word.title = `${n} ${data.tokens[n]}: ${value}`;
      });
    }

    words.forEach((word, n) => {
      word.onmouseenter = () => read(n);
      word.onmouseleave = () => read(kept);
      word.onclick = () => {
        kept = n;
        words.forEach((other) => other.classList.toggle("kept", other === word));
        read(n);
      };
    });
    select.onchange = paint;
    paint();
    read(kept);
  }

  for (const root of document.querySelectorAll(".tljax-prompt-features:not([data-ready])")) {
    root.dataset.ready = "yes";
    start(root, JSON.parse(root.querySelector("script[type='application/json']").textContent));
  }
})();
