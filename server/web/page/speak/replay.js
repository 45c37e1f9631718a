// A kept speech, heard again: the same shape as Speech, with nothing to wait for.

import { ElementPlayer } from "../audio/element_player.js";
import { peaksOf } from "../audio/peaks.js";
import { playable } from "./speech.js";
import { Shared } from "../ui.js";

export class Replay {
  over = true;

  constructor(kept, audio) {
    this.request = kept.request;
    this.format = kept.request.response_format;
    this.blob = kept.blob;
    this.state = new Shared({
      phase: "done",
      reason: kept.reason,
      model: kept.model,
      seconds: kept.seconds,
      firstAudio: kept.firstAudio,
      realTime: kept.realTime,
      peaks: null,
      player: new ElementPlayer(audio),
    });
    this.rate = kept.rate;
  }

  async run() {
    const file = playable(this.blob, this.format, this.rate);
    const { player } = this.state.value;
    player.load(file);
    player.play();
    const peaks = await peaksOf(file);
    this.state.value = { ...this.state.value, peaks };
  }

  stop() {
    this.state.value.player.pause();
  }

  close() {
    this.state.value.player.close();
  }
}
