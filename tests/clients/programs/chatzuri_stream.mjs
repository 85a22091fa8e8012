// Chatzuri's page: how to stream, by fetch. Its host, key, chatbot and question are replaced.
const response = await fetch(`${process.env.PARLEY_URL}/api/v1/chat`, {
  method: "POST",
  headers: {
    Authorization: `Bearer ${process.env.PARLEY_KEY}`,
  },
  body: JSON.stringify({
    messages: [
      { content: "How can I help you?", role: "assistant" },
      { content: process.env.QUESTION, role: "user" },
    ],
    chatbotId: process.env.CHATBOT,
    stream: true,
    temperature: 0,
    model: "gpt-3.5-turbo",
  }),
});
if (!response.ok) {
  const errorData = await response.json();
  throw Error(errorData.message);
}
const data = response.body;
if (!data) {
  // error happened
}
const reader = data.getReader();
const decoder = new TextDecoder();
let done = false;
while (!done) {
  const { value, done: doneReading } = await reader.read();
  done = doneReading;
  const chunkValue = decoder.decode(value);
  console.log(chunkValue); // This will log chunks of the chatbot reply until the reply is finished.
}
