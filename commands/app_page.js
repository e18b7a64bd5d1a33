// Links the player, the film strip and the slider of the moment that looks back.
() => {
  const player = () => document.querySelector("#player video");
  const setMoment = (seconds) => {
    const slider = document.querySelector("#second input[type=range]");
    const strip = document.querySelector(".strip");
    if (!slider || !strip) return;
    const begins = JSON.parse(strip.dataset.begins).filter((begin) => begin <= seconds + 0.005);
    const value = begins.length ? begins[begins.length - 1] : 0;
    if (Math.abs(Number(slider.value) - value) < 0.005) return;
    slider.value = value;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const follow = (event) => {
    if (event.target.closest("#player")) setMoment(event.target.currentTime);
  };
  document.addEventListener("timeupdate", follow, true); // media events do not bubble
  document.addEventListener("click", (event) => {
    const moment = event.target.closest(".strip .moment");
    if (!moment) return;
    const time = Number(moment.dataset.from);
    if (player()) player().currentTime = time + 0.01;
    setMoment(time);
  });
}
