// A conversation: turns of a message and the replies to it, of which one is continued. The last turn can be repeated.
export class Conversation {
  // chosen: called when another reply is chosen; retried, edited: called with the message of the last turn, which is removed.
  constructor(list, { chosen, retried, edited }) {
    this._list = list;
    this._list.addEventListener("change", chosen);
    this._retried = retried;
    this._edited = edited;
    this._turns = [];
  }

  get replies() {
    return this._turns.flatMap((turn) => turn.replies);
  }

  get running() {
    return this.replies.some((reply) => reply.running);
  }

  // The messages so far, without those that have no reply because it failed.
  get messages() {
    return this._turns
      .map((turn) => [{ role: "user", content: turn.message }, { role: "assistant", content: chosenOf(turn) }])
      .filter(([, reply]) => reply.content)
      .flat();
  }

  get lastReply() {
    return this._turns.length ? chosenOf(this._turns.at(-1)) : "";
  }

  add(message, replies) {
    for (const { choices } of this._turns) for (const choice of choices) choice.disabled = true;
    const choices = replies.length > 1 ? replies.map((reply) => reply.choice(`turn-${this._turns.length}`)) : [];
    if (choices.length) choices[0].checked = true;
    const element = document.createElement("li");
    const text = document.createElement("p");
    text.className = "message";
    text.textContent = message;
    const row = document.createElement("div");
    row.className = "outputs";
    row.append(...replies.map((reply) => reply.element));
    const buttons = document.createElement("div");
    buttons.className = "buttons";
    buttons.append(this._button("Retry", this._retried), this._button("Edit", this._edited));
    element.append(text, row, buttons);
    this._list.append(element);
    this._turns.push({ message, replies, choices, element });
  }

  clear() {
    for (const reply of this.replies) reply.stop();
    this._turns = [];
    this._list.replaceChildren();
  }

  // Returns a button that removes the last turn, and then calls `act` with its message.
  _button(name, act) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      const { message, replies, element } = this._turns.pop();
      for (const reply of replies) reply.stop();
      element.remove();
      for (const choice of this._turns.at(-1)?.choices ?? []) choice.disabled = false;
      act(message);
    });
    return button;
  }
}

// Returns the text of the reply that is continued: the first one, unless another is chosen.
function chosenOf({ replies, choices }) {
  return replies[Math.max(0, choices.findIndex((choice) => choice.checked))].generated.trim();
}
