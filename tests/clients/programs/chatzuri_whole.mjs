// Chatzuri's page: how to chat, by fetch. Its host, key, chatbot and question are replaced.
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
    stream: false,
    model: "gpt-3.5-turbo",
    temperature: 0,
  }),
});
if (!response.ok) {
  const errorData = await response.json();
  throw Error(errorData.message);
}
const data = await response.json();
// The page logs the object, which Node would show in its own way.
console.log(JSON.stringify(data)); // { "text": "..."}
